"""`sfpo.snapshot: host`: theta_0 in host memory, for a device that has no room for a second copy.

On CUDA theta_0 leaves on a side stream while the first fast pass computes: only its optimizer step
waits for the end of the copy. It comes back during the reposition through two staging buckets, one
on its way while the other is read. What is exposed is shard bytes / PCIe bandwidth, once a step.
On CPU the same code copies at once; the results are those of `sfpo.SlowSnapshot` bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from sfpo_megatron.sfpo import WeightShards
from sfpo_megatron.snapshots.pinning import host_buffer, pin

BUCKET_BYTES = 32 * 2**20
"""Size of each staging bucket: 0.6 ms of PCIe 5, far above what starting a copy costs."""

_Kind: TypeAlias = tuple[torch.dtype, torch.device]


class SteppedShards(WeightShards, Protocol):
    """Shards that tell when they are about to change."""

    def before_step(self, callback: Callable[[], None]) -> None:
        """Call `callback` in each later optimizer step, before it changes a shard."""


class HostSnapshot:
    """Holds theta_0 in host memory, page-locked for a CUDA device.

    Costs 4 bytes a parameter of the shard in host memory for fp32 main params, and two buckets of
    at most `bucket_bytes` on the device. Shards must be contiguous (ValueError).
    """

    def __init__(self, shards: SteppedShards, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._shards = shards
        sizes: dict[_Kind, int] = {}
        storages: dict[_Kind, list[int]] = {}
        for shard in shards.tensors():
            if not shard.is_contiguous():
                raise ValueError(
                    f"sfpo.snapshot: found host and a main param of strides {shard.stride()}, "
                    "expected contiguous ones; set sfpo.snapshot=device"
                )
            kind = (shard.dtype, shard.device)
            sizes[kind] = sizes.get(kind, 0) + shard.numel()
            if shard.numel():
                storages.setdefault(kind, []).append(shard.data_ptr())
        self._copies = {
            kind: _HostCopy(
                kind,
                size,
                bucket_bytes=bucket_bytes,
                # Shards drawn one after another into the same staging buffer.
                reused=len(set(storages.get(kind, ()))) < len(storages.get(kind, ())),
            )
            for kind, size in sizes.items()
        }
        shards.before_step(self._finish_storing)

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory held on this rank."""
        return sum(copy.num_bytes for copy in self._copies.values())

    @property
    def num_staging_bytes(self) -> int:
        """Bytes held on the shards' device."""
        return sum(copy.num_staging_bytes for copy in self._copies.values())

    @torch.no_grad()
    def take(self) -> None:
        for copy in self._copies.values():
            copy.rewind()
        for shard in self._shards.tensors():
            self._copies[shard.dtype, shard.device].store(shard.view(-1))

    @torch.no_grad()
    def reposition(self, alpha: float) -> None:
        for copy in self._copies.values():
            copy.rewind()
            copy.start_fetching()
        for shard in self._shards.tensors():
            self._copies[shard.dtype, shard.device].lerp(shard.view(-1), alpha)
        for copy in self._copies.values():
            copy.finish_fetching()
        self._shards.publish()

    def buffers(self) -> list[Tensor]:
        return [bucket for copy in self._copies.values() for bucket in copy.staging]

    def _finish_storing(self) -> None:
        for copy in self._copies.values():
            copy.finish_storing()


class _HostCopy:
    """The shards of one dtype and device, one after another in one host buffer."""

    def __init__(self, kind: _Kind, size: int, *, bucket_bytes: int, reused: bool) -> None:
        dtype, device = kind
        self._side = _SideStream(device)
        self._reused = reused
        self._host = host_buffer(size * dtype.itemsize).view(dtype)
        if device.type == "cuda" and size:
            pin(self._host, owner=self, key="sfpo.snapshot", found="host", instead="device")
        self._bucket_size = max(1, min(bucket_bytes // dtype.itemsize, -(-size // 2)))
        self.staging = [torch.empty(self._bucket_size, dtype=dtype, device=device) for _ in "01"]
        self._position = 0  # in elements; the next shard begins there
        self._stored: _Mark = None
        self._arrived: list[_Mark] = [None, None]
        self._lerped: _Mark = None

    @property
    def num_bytes(self) -> int:
        return self._host.nbytes

    @property
    def num_staging_bytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.staging)

    def rewind(self) -> None:
        """Go back to the first shard. Drawing one may overwrite what is still being copied out."""
        self.finish_storing()
        self._position = 0

    def store(self, shard: Tensor) -> None:
        """Copy theta_0 of one shard. The copy may still be under way when this returns."""
        target = self._host[self._position : self._position + shard.numel()]
        self._position += shard.numel()
        self._stored = self._side.copy(target, shard, after=self._side.mark())
        if self._reused:  # drawing the next shard overwrites this one
            self._side.hold_current(self._stored)

    def finish_storing(self) -> None:
        """Let what is put on the current stream from here on change the shards."""
        self._side.hold_current(self._stored)

    def start_fetching(self) -> None:
        for index in (0, 1):
            self._fetch(index)

    def lerp(self, shard: Tensor, alpha: float) -> None:
        """Compute theta = theta_0 + alpha * (theta - theta_0), a bucket at a time."""
        while shard.numel():
            index, offset = divmod(self._position, self._bucket_size)
            if offset == 0:
                self._side.hold_current(self._arrived[index % 2])
            slow = self.staging[index % 2][offset : offset + shard.numel()]
            part, shard = shard.split([slow.numel(), shard.numel() - slow.numel()])
            torch.lerp(slow, part, alpha, out=part)
            self._position += slow.numel()
            if self._position % self._bucket_size == 0:  # this bucket is read: refill it
                self._lerped = self._side.mark()
                self._fetch(index + 2)

    def finish_fetching(self) -> None:
        self._lerped = self._side.mark()

    def _fetch(self, index: int) -> None:
        """Copy bucket `index` of theta_0 into the staging bucket that bucket `index - 2` had."""
        start = index * self._bucket_size
        slow = self._host[start : start + self._bucket_size]
        target = self.staging[index % 2][: slow.numel()]
        self._arrived[index % 2] = self._side.copy(target, slow, after=self._lerped)


_Mark: TypeAlias = "torch.cuda.Event | None"
"""A point in a stream's work; None if there is nothing to wait for."""


class _SideStream:
    """A CUDA stream beside the current one. On CPU a copy is done when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor, *, after: _Mark) -> _Mark:
        """Copy `source` into `target` once `after` is reached; returns the mark of its end."""
        if self._stream is None:
            target.copy_(source)
            return None
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def mark(self) -> _Mark:
        """The end of what has been put on the current stream."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def hold_current(self, mark: _Mark) -> None:
        """Let what is put on the current stream from here on wait for `mark`."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
