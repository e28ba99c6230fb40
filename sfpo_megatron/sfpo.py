"""Slow-Fast Policy Optimization (arXiv 2510.04072), the whole algorithm.

For each rollout batch, with theta the fp32 main params and one *pass* = one sweep over all
minibatches of the batch (one optimizer step each):

    1. snapshot         theta_0 = theta
    2. fast passes      theta_K = pass(...pass(theta_0))          K times, the same batch
    3. reposition       theta_a = theta_0 + alpha * (theta_K - theta_0)
    4. slow correction  theta   = pass(theta_a)                   once more, the same batch

The entropy gate ends it: once the z-score of the policy entropy crosses a threshold, K becomes 0
and every batch gets the plain single pass (GRPO).

Only weights are repositioned: Adam's moments and step count carry through all passes. Steps 1 and
3 are elementwise, so each rank does them on its own shard with no collective; only
`WeightShards.publish` communicates. Nothing here knows about Megatron: its binding is
`mcore.shards.MainParamShards`. Variants of the snapshot are in `snapshots/`: kept in host memory,
or with Adam's moments put back too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

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
        self._views = [self._buffers[key][span].view(shape) for key, span, shape in places]

    def paired(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(view into the copy, tensor) for each tensor, which is drawn only when asked for."""
        # strict draws past the last one too: then its edit counts.
        return zip(self._views, tensors, strict=True)

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


class EntropyGate:
    """Decides, before each train step, whether SFPO is still on (the paper's stopping rule, with
    the window semantics of the released reference, ray_trainer.py).

    `observe` takes the exact mean token entropy (nats) of a step's slow correction. With the last
    `window` values in hand, the newest included, z = (newest - mean) / population std; the gate
    closes at z >= threshold (two-sided: |z|). `latch` keeps it closed for good. To be decided on
    one rank and broadcast: ranks that branch apart hang each other.
    """

    def __init__(
        self,
        *,
        window: int = 30,
        zscore_threshold: float = 1.0,
        two_sided: bool = False,
        latch: bool = True,
        stop_step: int | None = None,
    ) -> None:
        self._window: deque[float] = deque(maxlen=window)
        self._threshold = zscore_threshold
        self._two_sided = two_sided
        self._latch = latch
        self._stop_step = stop_step
        self._tripped = False

    def observe(self, entropy: float) -> None:
        """Add the entropy of the step that just ended."""
        if not math.isfinite(entropy):
            raise ValueError(f"entropy {entropy!r} of the last step is not a finite number")
        self._window.append(entropy)
        z = self.zscore
        crossed = z is not None and (abs(z) if self._two_sided else z) >= self._threshold
        self._tripped = crossed or (self._latch and self._tripped)

    @property
    def zscore(self) -> float | None:
        """z of the newest entropy; None until the window is full."""
        values = list(self._window)
        if len(values) < (self._window.maxlen or 0):
            return None
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        return (values[-1] - mean) / (std + 1e-9)

    def is_open(self, step: int) -> bool:
        """Whether train step `step` (the first is 1) makes fast passes."""
        stopped = self._stop_step is not None and step >= self._stop_step
        return not (self._tripped or stopped)

    def state_dict(self) -> dict[str, Any]:
        return {"window": list(self._window), "tripped": self._tripped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window.clear()
        self._window.extend(state["window"])
        self._tripped = state["tripped"]
