"""Slow-Fast Policy Optimization (arXiv 2510.04072), the whole algorithm.

For each rollout batch, with theta the fp32 main params and one *pass* = one sweep over all
minibatches of the batch (one optimizer step each):

    1. snapshot         theta_0 = theta
    2. fast passes      theta_K = pass(...pass(theta_0))          K times, the same batch
    3. reposition       theta_a = theta_0 + alpha * (theta_K - theta_0)
    4. slow correction  theta   = pass(theta_a)                   once more, the same batch

The entropy gate (gate.py) ends it: once the z-score of the policy entropy crosses a threshold, K
becomes 0 and every batch gets the plain single pass (GRPO).

Only weights are repositioned: Adam's moments and step count carry through all passes. Steps 1 and
3 are elementwise, so each rank does them on its own shard with no collective; only
`WeightShards.publish` communicates. Nothing here knows about Megatron: its binding is
`mcore.shards.MainParamShards`. Variants of the snapshot are in `snapshots/`: kept in host memory,
with Adam's moments put back too, or (PrePO) with a reposition to where K passes would have led.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class WeightShards(Protocol):
    """This rank's part of the weights that the optimizer owns."""

    def tensors(self) -> Iterable[Tensor]:
        """The shards one after another; order, sizes and dtypes are the same at each call. An edit
        in place counts if it is made before the next shard is drawn."""

    def publish(self) -> None:
        """Make edits of the shards visible to the next forward. Collective: every rank calls it."""


class Snapshot(Protocol):
    """Steps 1 and 3; `SlowSnapshot` is the plain one."""

    def take(self) -> None:
        """theta_0 = theta."""

    def reposition(self, alpha: float) -> None:
        """theta = theta_0 + alpha * (theta - theta_0), then publish. Collective."""

    def buffers(self) -> list[Tensor]:
        """What it holds on the device: of no use between `reposition` and the next `take`."""


class FlatCopy:
    """A copy of tensors in one preallocated flat buffer per dtype and device."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        places = []
        for tensor in tensors:
            key = (tensor.dtype, tensor.device)
            start = sizes.get(key, 0)
            sizes[key] = start + tensor.numel()
            places.append((key, slice(start, sizes[key]), tensor.shape))
        self._buffers = {
            key: torch.empty(size, dtype=key[0], device=key[1]) for key, size in sizes.items()
        }
        self.views = [self._buffers[key][span].view(shape) for key, span, shape in places]

    def paired(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(view into the copy, tensor) for each tensor, which is drawn only when asked for."""
        # strict draws past the last one too: then its edit counts.
        return zip(self.views, tensors, strict=True)

    @property
    def buffers(self) -> list[Tensor]:
        return list(self._buffers.values())

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class SlowSnapshot:
    """Holds theta_0 of this rank's shards and moves the shards back towards it.

    Costs 4 bytes a parameter of the shard for fp32 main params, on the shard's device.
    """

    def __init__(self, shards: WeightShards) -> None:
        self._shards = shards
        self._slow = FlatCopy(shards.tensors())

    @property
    def num_bytes(self) -> int:
        """Bytes held on this rank."""
        return self._slow.num_bytes

    @torch.no_grad()
    def take(self) -> None:
        for slow, shard in self._slow.paired(self._shards.tensors()):
            slow.copy_(shard)

    @torch.no_grad()
    def reposition(self, alpha: float) -> None:
        # torch.lerp is bit-exact at both ends (alpha 0 and 1); the formula written out is not.
        for slow, shard in self._slow.paired(self._shards.tensors()):
            torch.lerp(slow, shard, alpha, out=shard)
        self._shards.publish()

    def buffers(self) -> list[Tensor]:
        return self._slow.buffers


def sfpo_step(
    run_pass: Callable[[], T], snapshot: Snapshot, *, num_fast_passes: int, alpha: float
) -> list[T]:
    """One SFPO update on one rollout batch; K = 0 is the plain update.

    Returns what `run_pass` returned: the K fast passes', then the slow correction's. Collective:
    every rank calls it with the same arguments.
    """
    results: list[T] = []
    if num_fast_passes > 0:
        snapshot.take()
        for _ in range(num_fast_passes):
            results.append(run_pass())
        snapshot.reposition(alpha)
    results.append(run_pass())
    return results
