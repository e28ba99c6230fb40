"""Moves the trainer's memory to the host and back, while engines have the devices that both share.

In place: a tensor's storage is copied out and resized to nothing, and before it is copied back it
gets its size again. Tensor objects stay the same, so every view that Megatron holds stays valid: of
params and shards in the DDP buffers, of buckets, the cached lists of their parts. Only addresses
change, so CUDA graphs and registered NCCL buffers are refused (config/rules/engines.py).

    copied    model params, main params, the optimizer's state
    dropped   DDP's grad buffers (zeroed before each minibatch), the snapshot's buffers (rewritten)

Not moved: what is in host memory already (a CPU-offloaded optimizer), buffers of modules, CUDA's
and NCCL's own. On CPU the same code runs, from memory to memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfpo_megatron.snapshots.pinning import host_buffer, pin

if TYPE_CHECKING:
    from sfpo_megatron.mcore.setup import Policy

_ALIGN_BYTES = 64
_GIB = 2**30
_WORTH_SAYING_GIB = 0.25

log = logging.getLogger(__name__)


class Offload:
    """Moves one rank's policy; it begins on the device."""

    def __init__(
        self, policy: Policy, scratch: Callable[[], Iterable[Tensor]] = lambda: ()
    ) -> None:
        """`scratch`: tensors whose contents nobody needs when `offload` is called."""
        self._policy = policy
        self._scratch = scratch
        self._device = next(policy.chunks[0].parameters()).device
        self._host: _HostMemory | None = None
        self._kept: list[torch.UntypedStorage] = []
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []
        self._said_gib = 0.0

    @property
    def is_offloaded(self) -> bool:
        return bool(self._kept)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, page-locked on CUDA, held from the first `offload` on."""
        return self._host.num_bytes if self._host is not None else 0

    @torch.no_grad()
    def make_room(self) -> None:
        """Free what nobody needs until `onload`, which has to follow: gradient buffers and scratch,
        and what torch's allocator keeps beyond what is in use, such as the last pass's activations.
        Before engines take their weights' memory: both sides' are on the device in a refit."""
        assert not self.is_offloaded
        self._policy.optimizer.zero_grad()  # its grads may be copies of the buffers'
        kept = {storage._cdata for storage in self._storages(self._state())}
        self._empty(s for s in self._storages(self._unneeded()) if s._cdata not in kept)
        self._free_cache()

    @torch.no_grad()
    def offload(self) -> None:
        """Free the device's memory once gathers that are due have run. Until `onload` every
        use of the weights raises RuntimeError. Collective."""
        shards = self._policy.shards
        shards.params_ready()
        self.make_room()
        self._kept = list(self._storages(self._state()))
        if self._host is None or self._host.num_bytes < _HostMemory.needed(self._kept):
            self._host = None  # Adam's state came into being: first give the smaller one back
            self._host = _HostMemory(_HostMemory.needed(self._kept), self._device)
        self._host.store(self._kept)
        self._empty(self._kept)
        shards.on_device = False
        self._free_cache()
        if self._device.type == "cuda":
            self._say_what_stays()

    @torch.no_grad()
    def onload(self) -> None:
        """Inverse of `offload`, bit for bit; dropped tensors hold anything. No communication."""
        assert self.is_offloaded and self._host is not None
        for storage, num_bytes in self._sizes:
            storage.resize_(num_bytes)
        self._host.fetch(self._kept)
        self._kept, self._sizes = [], []
        self._policy.shards.on_device = True

    def _empty(self, storages: Iterable[torch.UntypedStorage]) -> None:
        for storage in storages:
            self._sizes.append((storage, storage.nbytes()))
            storage.resize_(0)

    def _free_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _say_what_stays(self) -> None:
        """Log what is left on the device where that has grown: engines get the rest."""
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        if reserved / _GIB > self._said_gib + _WORTH_SAYING_GIB or not self._said_gib:
            self._said_gib = reserved / _GIB
            log.info("%s", residue(reserved=reserved, free=free, total=total))

    def _state(self) -> Iterator[Tensor]:
        for chunk in self._policy.chunks:
            yield from (param.data for param in chunk.parameters())
        yield from self._policy.shards.storages()

    def _unneeded(self) -> Iterator[Tensor]:
        params = [param for chunk in self._policy.chunks for param in chunk.parameters()]
        yield from (p.main_grad for p in params if getattr(p, "main_grad", None) is not None)
        yield from self._scratch()

    def _storages(self, tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
        """Every storage on the device, each once."""
        seen = set()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == self._device and storage.nbytes() and storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage


def residue(*, reserved: int, free: int, total: int) -> str:
    """What the trainer leaves on a device, in words; sizes in bytes."""
    kept, used, whole = (number / _GIB for number in (reserved, total - free, total))
    return (
        f"the trainer's tensors keep {kept:.2f} GiB while engines have the device, of which "
        f"{used:.2f} of {whole:.1f} GiB are in use: contexts, libraries, the engine's weights too"
    )


class _HostMemory:
    """One buffer for all storages, one after another."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._buffer = host_buffer(num_bytes)
        if device.type == "cuda":
            key = "rollout.placement"
            pin(self._buffer, owner=self, key=key, found="colocated", instead="dedicated")

    @staticmethod
    def needed(storages: Iterable[torch.UntypedStorage]) -> int:
        return sum(-(-storage.nbytes() // _ALIGN_BYTES) * _ALIGN_BYTES for storage in storages)

    @property
    def num_bytes(self) -> int:
        return self._buffer.nbytes

    def store(self, storages: Iterable[torch.UntypedStorage]) -> None:
        for place, storage in self._pairs(storages):
            place.copy_(storage, non_blocking=True)
        self._wait()

    def fetch(self, storages: Iterable[torch.UntypedStorage]) -> None:
        for place, storage in self._pairs(storages):
            storage.copy_(place, non_blocking=True)
        self._wait()

    def _pairs(self, storages: Iterable[torch.UntypedStorage]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a place in the buffer and a storage as bytes."""
        start = 0
        for storage in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
            yield self._buffer[start : start + whole.numel()], whole
            start += _HostMemory.needed([storage])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
