"""The weights that the frozen reference policy exchanges.

Not exercised here: the exchange and its passes (tests/dist/test_reference.py).
"""

from __future__ import annotations

import torch

from sfpo_megatron.mcore.reference_policy import _weights


class _Growing(torch.nn.Linear):
    """A layer whose extra state grows, like TransformerEngine's after an FP8 forward."""

    size = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(self.size, dtype=torch.uint8)


def test_extra_state_is_not_exchanged() -> None:
    layer = _Growing(2, 3)
    for layer.size in (0, 37):
        found = [tensor.data_ptr() for tensor in _weights([layer])]
        assert found == [layer.weight.data_ptr(), layer.bias.data_ptr()], layer.size
