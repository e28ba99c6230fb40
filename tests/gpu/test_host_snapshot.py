"""snapshots/host.py on a CUDA device, with plain tensors as shards: bits, order, memory.

Not exercised here: Megatron's optimizers (tests/dist), several devices.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots.host import HostSnapshot
from sfpo_megatron.snapshots.pinning import host_buffer, pin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20
SIZES = [3 * MIB + 5, 1, 70_000, 0, 2 * MIB, 999]
"""Elements; 21 MB in all: many buckets of 256 KiB."""
LATE = 50_000_000
"""Cycles, about 30 ms: a stream that starts so late has not done what is not waited for."""


class AdamShards:
    """fp32 CUDA tensors under torch's Adam; `staged`: drawn through one buffer, each edit written
    back when the next is drawn."""

    def __init__(self, *, staged: bool = False) -> None:
        random = torch.Generator("cuda").manual_seed(0)
        self.weights = [torch.randn(n, device="cuda", generator=random) for n in SIZES]
        self.optimizer = torch.optim.Adam([w for w in self.weights if w.numel()], lr=1e-2)
        self.random = random
        self.buffer = torch.empty(max(SIZES), device="cuda") if staged else None

    def tensors(self) -> Iterator[Tensor]:
        for weight in self.weights:
            if self.buffer is None:
                yield weight
            else:
                staged = self.buffer[: weight.numel()]
                yield staged.copy_(weight)
                weight.copy_(staged)

    def publish(self) -> None:
        pass

    def before_step(self, callback: Callable[[], None]) -> None:
        self.optimizer.register_step_pre_hook(lambda *_: callback())

    def step(self) -> None:
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, device="cuda", generator=self.random)
        self.optimizer.step()


def late_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy beside the current stream starts late."""
    from sfpo_megatron.snapshots import host

    original = host._SideStream.copy

    def copy(self, target: Tensor, source: Tensor, *, after: object) -> object:  # type: ignore[no-untyped-def]
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(LATE // 50)
        return original(self, target, source, after=after)

    monkeypatch.setattr(host._SideStream, "copy", copy)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("late", ["neither", "side", "current"])
def test_the_bits_of_the_device_snapshot(
    monkeypatch: pytest.MonkeyPatch, staged: bool, late: str
) -> None:
    """Three SFPO steps, also where one of the two streams lags behind."""
    if late == "side":
        late_side_stream(monkeypatch)
    results = []
    for host in (False, True):
        shards = AdamShards(staged=host and staged)
        snapshot = HostSnapshot(shards, bucket_bytes=MIB // 4) if host else SlowSnapshot(shards)

        def run_pass(shards: AdamShards = shards) -> None:
            if late == "current":
                torch.cuda._sleep(LATE)
            shards.step()

        for _ in range(3):
            sfpo_step(run_pass, snapshot, num_fast_passes=2, alpha=0.8)
        results.append([w.cpu() for w in shards.weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_copy_out_does_not_hold_the_current_stream() -> None:
    """take() returns, and kernels of the first pass run, while the side stream still waits."""
    shards = AdamShards()
    snapshot = HostSnapshot(shards)
    (copy,) = snapshot._copies.values()
    with torch.cuda.stream(copy._side._stream):
        torch.cuda._sleep(100 * LATE)
    snapshot.take()
    done = torch.cuda.current_stream().record_event()
    done.synchronize()
    assert not copy._stored.query(), "the copy is done: the test did not delay it"
    torch.cuda.synchronize()


def test_memory_is_two_buckets_on_the_device_and_the_exact_size_on_the_host() -> None:
    shards = AdamShards()
    gc.collect()
    before = torch.cuda.memory_allocated()
    snapshot = HostSnapshot(shards, bucket_bytes=MIB)
    assert torch.cuda.memory_allocated() - before == 2 * MIB == snapshot.num_staging_bytes
    (copy,) = snapshot._copies.values()
    assert copy._host.untyped_storage().nbytes() == snapshot.num_bytes == 4 * sum(SIZES)
    assert copy._host.is_pinned()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    snapshot.take()
    snapshot.reposition(0.8)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


def test_host_memory_is_given_back_with_the_snapshot() -> None:
    shards = AdamShards()
    shards.before_step = lambda callback: None  # type: ignore[method-assign]
    snapshot = HostSnapshot(shards)
    (copy,) = snapshot._copies.values()
    host = copy._host
    snapshot.take()
    del snapshot, copy
    gc.collect()
    assert not host.is_pinned()


def test_a_refused_page_locking_is_not_the_next_kernels_error() -> None:
    """CUDA refuses to lock what is locked, and keeps that for the thread's next look for errors."""
    buffer, owners = host_buffer(MIB), [AdamShards(), AdamShards()]
    setting = {"key": "a.key", "found": "this", "instead": "that"}
    pin(buffer, owner=owners[0], **setting)
    with pytest.raises(RuntimeError, match="cannot be page-locked"):
        pin(buffer, owner=owners[1], **setting)
    assert torch.ones(4, device="cuda").sum() == 4
