"""PrePO (arXiv 2605.06755), `sfpo.trajectory: predicted`: SFPO whose fast trajectory is predicted.

SFPO with two real fast passes and another reposition, so 3 passes whatever K is. With theta_1 and
theta_2 after these passes, and per coordinate:

    d_0 = theta_0 - theta_1 - (1 - c) theta_0      what the first pass moved it by, and
    d_1 = theta_1 - theta_2 - (1 - c) theta_1      the second; c: what a pass's weight decay leaves
    r   = d_1 / d_0, in [-2, 3]                    each further pass would go r times as far
    q   = S_K(r) / S_2(r), in [1, K/2 + 1]         S_n(r) = 1 + r + ... + r^(n - 1)

    theta_a = theta_0 + alpha * q * (theta_2 - theta_0)

q = 1, which is SFPO's own reposition of two fast passes, where there is nothing to predict from:
where |d_0| is at most 1e-3 of its root mean square over the whole weight, where S_2 is 0, and
everywhere if K = 2 or an optimizer step was skipped. The optimizer state goes back to that of
theta_0 (`sfpo.moments: restore`); the method's ablation keeps it.

Elementwise on this rank's shards but for the mean square, one reduction a train step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sfpo_megatron.sfpo import FlatCopy, SlowSnapshot
from sfpo_megatron.snapshots.host import SteppedShards

R_BOUNDS = (-2.0, 3.0)
"""Beyond them q is at a bound of its own: they keep the powers of r small."""
LEAST_D = 1e-3
"""Least |d_0| that is divided by, in root mean squares."""
_LEAST_SUM = 1e-8
_PIECE_NUMEL = 1 << 22
"""Elements whose q is computed at a time: a few buffers of 16 MiB."""


class TrajectoryShards(SteppedShards, Protocol):
    """Shards of weights that know what a pass does to them."""

    def decays(self) -> Sequence[float]:
        """Share of each shard's weights that one optimizer step takes off beside its direction: lr
        x weight decay if decoupled, else 0."""

    def means(self, sums: Tensor) -> Tensor:
        """[shards], float64 on the CPU: from sums over the elements of each shard the mean over
        those of the whole weight that it is of. Collective."""


class Scales:
    """Statistics of q over this rank's elements, since they were last taken."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []  # on the device: read when they are taken

    def see(self, scale: Tensor, *, horizon: int) -> None:
        """Count the q of some elements, at least one."""
        flags = [torch.ones_like(scale), scale, scale >= horizon / 2 + 1, scale == 1]
        sums = [flag.sum(dtype=torch.float64) for flag in flags]
        self._found.append(torch.stack([*sums, scale.max().double()]))

    def take(self) -> tuple[Tensor, Tensor]:
        """[4], the number of elements, the sum of their q, how many are at its upper bound and how
        many are 1; and [1], the largest. float64 on the CPU; of no element 0 and 1."""
        found, self._found = self._found, []
        rows = torch.stack([torch.tensor([0.0, 0, 0, 0, 1]).double(), *(f.cpu() for f in found)])
        return rows[:, :4].sum(dim=0), rows[:, 4].max()[None]


class PredictedSnapshot(SlowSnapshot):
    """A snapshot that also holds theta_1: 4 more bytes a parameter of the shard.

    horizon: K, the passes of the predicted trajectory. steps_per_pass: optimizer steps of a pass.
    scales: is shown every q that was predicted.
    """

    def __init__(
        self, shards: TrajectoryShards, *, horizon: int, steps_per_pass: int, scales: Scales
    ) -> None:
        super().__init__(shards)
        self._trajectory = shards
        self._first = FlatCopy(shards.tensors())
        self._horizon = horizon
        self._steps_per_pass = steps_per_pass
        self._scales = scales
        self._num_steps = 2 * steps_per_pass  # since `take`
        shards.before_step(self._see_step)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self._first.num_bytes

    def take(self) -> None:
        super().take()
        self._num_steps = 0

    @torch.no_grad()
    def reposition(self, alpha: float) -> None:
        if self._horizon == 2 or self._num_steps != 2 * self._steps_per_pass:
            super().reposition(alpha)
            return
        decays = [1 - (1 - each) ** self._steps_per_pass for each in self._trajectory.decays()]
        least = LEAST_D * self._trajectory.means(self._squares(decays)).sqrt()
        for (slow, shard), first, decay, floor in zip(
            self._slow.paired(self._shards.tensors()),
            self._first.views,
            decays,
            least.tolist(),
            strict=True,
        ):
            for start, middle, end in _pieces(slow, first, shard):
                moved = _moved(start, middle, decay), _moved(middle, end, decay)
                scale = predicted_scale(*moved, least=floor, horizon=self._horizon)
                self._scales.see(scale, horizon=self._horizon)
                torch.lerp(start, end, scale.mul_(alpha), out=end)
        self._shards.publish()

    def buffers(self) -> list[Tensor]:
        return super().buffers() + self._first.buffers

    @torch.no_grad()
    def _see_step(self) -> None:
        """Copy theta_1 before the second pass's first step changes it."""
        if self._num_steps == self._steps_per_pass:
            for first, shard in self._first.paired(self._shards.tensors()):
                first.copy_(shard)
        self._num_steps += 1

    def _squares(self, decays: Sequence[float]) -> Tensor:
        """[shards] float64 on the CPU: sums of d_0 squared."""
        shards = zip(self._slow.views, self._first.views, decays, strict=True)
        norms = [
            torch.linalg.vector_norm(_moved(slow, first, decay), dtype=torch.float64)
            for slow, first, decay in shards
        ]  # all are under way before the first is read
        return torch.tensor([float(norm) for norm in norms], dtype=torch.float64).square()


def _moved(start: Tensor, end: Tensor, decay: float) -> Tensor:
    """Start - end - decay * start. Two close numbers subtract without rounding, c * start would
    round as much as a small step moves."""
    return torch.sub(start, end).sub_(start, alpha=decay)


def predicted_scale(d_0: Tensor, d_1: Tensor, *, least: float, horizon: int) -> Tensor:
    """Elementwise q of two displacements; `least`: of |d_0|."""
    r = torch.div(d_1, d_0).clamp_(*R_BOUNDS)
    total = torch.ones_like(r)
    for _ in range(horizon - 1):
        total.mul_(r).add_(1)
    both = r.add_(1)
    scale = total.div_(both).clamp_(1.0, horizon / 2 + 1)
    predicts = (d_0.abs() > least) & (both.abs() > _LEAST_SUM)
    return torch.where(predicts, scale, 1.0)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of tensors of one shape, as views."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
    elif tensors[0].numel():
        yield from zip(*(t.view(-1).split(_PIECE_NUMEL) for t in tensors), strict=True)
