"""What the reposition does to Adam: `sfpo.moments: restore | reset` (keep is `SlowSnapshot` alone).

The moments of the fast passes were taken along a path that the reposition steps back from. The
paper and its reference keep them; here are the two other choices, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfpo_megatron.sfpo import FlatCopy, Snapshot


class AdamState(Protocol):
    """The optimizer state of this rank's shards."""

    def moments(self) -> Sequence[Tensor]:
        """exp_avg and exp_avg_sq of every shard, the optimizer's own storage, same order at each
        call; empty before the first optimizer step. ValueError if they cannot be moved."""

    def step_counts(self) -> list[float]:
        """Adam's step counts, as many as the optimizer keeps; empty before the first step."""

    def set_step_counts(self, counts: Sequence[float]) -> None:
        """Inverse of `step_counts`."""


class MomentSnapshot:
    """A snapshot that moves Adam's moments and step count with the weights.

    restore: back to what they were at `take` (8 more bytes a parameter of the shard); before the
    first optimizer step that is zero, as reset always is.
    """

    def __init__(
        self, weights: Snapshot, adam: AdamState, *, mode: Literal["restore", "reset"]
    ) -> None:
        adam.moments()  # refuses now, at setup, what it could not move later
        self._weights = weights
        self._adam = adam
        self._restore = mode == "restore"
        self._slow: FlatCopy | None = None  # made at the first `take` that finds moments
        self._taken = False
        self._step_counts: list[float] = []

    @torch.no_grad()
    def take(self) -> None:
        self._weights.take()
        moments = self._adam.moments()
        self._taken = self._restore and bool(moments)
        if self._taken:
            if self._slow is None:
                self._slow = FlatCopy(moments)
            for slow, moment in self._slow.paired(moments):
                slow.copy_(moment)
            self._step_counts = self._adam.step_counts()

    @torch.no_grad()
    def reposition(self, alpha: float) -> None:
        self._weights.reposition(alpha)
        if self._taken and self._slow is not None:
            for slow, moment in self._slow.paired(self._adam.moments()):
                moment.copy_(slow)
            self._adam.set_step_counts(self._step_counts)
        else:
            for moment in self._adam.moments():
                moment.zero_()
            self._adam.set_step_counts([0.0] * len(self._adam.step_counts()))

    def buffers(self) -> list[Tensor]:
        return self._weights.buffers() + (self._slow.buffers if self._slow is not None else [])

    @property
    def num_bytes(self) -> int:
        """Bytes of the moments' copy on this rank."""
        return self._slow.num_bytes if self._slow is not None else 0
