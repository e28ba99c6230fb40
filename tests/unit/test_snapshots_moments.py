"""Adam's moments and step counts around two repositions, on plain tensors.

Megatron's optimizers: tests/dist/test_sfpo_exact.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sfpo_megatron.snapshots.moments import MomentSnapshot


class Adam:
    """Two params, with state from the first step on."""

    def __init__(self) -> None:
        self.state: list[Tensor] = []
        self.counts: list[float] = []

    def moments(self) -> Sequence[Tensor]:
        return self.state

    def step_counts(self) -> list[float]:
        return list(self.counts)

    def set_step_counts(self, counts: Sequence[float]) -> None:
        self.counts = list(counts)

    def step(self) -> None:
        if not self.state:
            self.state, self.counts = [torch.zeros(3) for _ in "1234"], [0.0, 0.0]
        for number, moment in enumerate(self.state, start=1):
            moment.add_(number)
        self.counts = [count + 1 for count in self.counts]


class Weights:
    """The snapshot of the weights, which notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def take(self) -> None:
        self.asked.append("take")

    def reposition(self, alpha: float) -> None:
        self.asked.append(f"reposition {alpha}")

    def buffers(self) -> list[Tensor]:
        return []


@pytest.mark.parametrize("mode", ["restore", "reset"])
def test_every_reposition_goes_back_to_the_last_take(mode: str) -> None:
    """Restored: to before the fast passes of this train step, not of an earlier one."""
    adam, weights = Adam(), Weights()
    snapshot = MomentSnapshot(weights, adam, mode=mode)  # type: ignore[arg-type]
    for train_step in range(3):
        taken = train_step if mode == "restore" else 0  # one slow correction a train step before
        snapshot.take()
        adam.step()
        adam.step()
        snapshot.reposition(0.5)
        assert adam.counts == [taken] * 2
        assert [moment.tolist() for moment in adam.state] == [
            [number * taken] * 3 for number in (1, 2, 3, 4)
        ]
        adam.step()
    assert weights.asked == ["take", "reposition 0.5"] * 3
    assert len(snapshot.buffers()) == (mode == "restore")
