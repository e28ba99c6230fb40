"""SGD's state: the momentum buffer.

Megatron's DistributedOptimizer takes no SGD; the optimizers without sharding do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfpo_megatron.mcore.shards.stepper import StepperKind


def _state(stepper: torch.optim.Optimizer, param: Tensor) -> None:
    """A buffer of zeros takes up the first gradient whole, as a missing one does."""
    if "momentum_buffer" not in stepper.state[param]:
        stepper.state[param]["momentum_buffer"] = torch.zeros_like(param.data)


SGD = StepperKind(
    name="sgd",
    classes=("SGD", "FusedSGD"),
    moments=("momentum_buffer",),
    count=None,
    make_state=_state,
)
