"""snapshots/host.py on plain tensors: SlowSnapshot's bits, and no race between the two streams.

The streams are played by `Race`, which knows of each operation what it reads and writes and
what its stream has waited for; so the events are checked where no CUDA is. Not exercised here:
CUDA itself, page-locked memory (tests/gpu), Megatron's optimizers (tests/dist).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sfpo_megatron.config.tree import SFPOConfig
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots import host
from sfpo_megatron.snapshots.host import HostSnapshot

SHAPES = [(4, 3), (7,), (0,), (1,), (5, 5), (64,), (3,)]


class Shards:
    """Main params with an optimizer step; `staged`: drawn one after another into one buffer."""

    def __init__(self, *, staged: bool = False, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(shape, generator=random) for shape in SHAPES]
        self.buffer = torch.empty(64) if staged else None
        self.random = random
        self.hooks: list[Callable[[], None]] = []
        self.published = 0
        self.race: Race | None = None

    def tensors(self) -> Iterator[Tensor]:
        for weight in self.weights:
            if self.buffer is None:
                yield weight
                continue
            staged = self.buffer[: weight.numel()].view(weight.shape)
            self.note(reads=[weight], writes=[staged])
            yield staged.copy_(weight)
            self.note(reads=[staged], writes=[weight])
            weight.copy_(staged)

    def publish(self) -> None:
        self.published += 1

    def before_step(self, callback: Callable[[], None]) -> None:
        self.hooks.append(callback)

    def step(self) -> None:
        for hook in self.hooks:
            hook()
        for weight in self.weights:
            self.note(reads=[weight], writes=[weight])
            weight.add_(torch.randn(weight.shape, generator=self.random), alpha=0.1)

    def note(self, *, reads: list[Tensor], writes: list[Tensor]) -> None:
        if self.race:
            self.race.operation("current", reads, writes)


def equal_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    bits = [[t.view(torch.int32) for t in tensors] for tensors in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*bits, strict=True))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 4, 12, 28, 256, 1 << 20])
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_the_bits_of_the_device_snapshot(staged: bool, bucket_bytes: int, alpha: float) -> None:
    plain, ours = Shards(), Shards(staged=staged)
    for shards, snapshot in (
        (plain, SlowSnapshot(plain)),
        (ours, HostSnapshot(ours, bucket_bytes=bucket_bytes)),
    ):
        for _ in range(3):
            sfpo_step(shards.step, snapshot, num_fast_passes=2, alpha=alpha)
    assert equal_bits(plain.weights, ours.weights)
    assert not equal_bits(plain.weights, Shards().weights)
    assert ours.published == 3


def test_kinds_of_shards_are_kept_apart() -> None:
    shards = Shards()
    shards.weights[1] = shards.weights[1].double()
    expected = [torch.lerp(w, w + 1, 0.8) for w in shards.weights]
    snapshot = HostSnapshot(shards, bucket_bytes=8)
    snapshot.take()
    for weight in shards.weights:
        weight.add_(1.0)
    snapshot.reposition(0.8)
    assert all(torch.equal(a, b) for a, b in zip(shards.weights, expected, strict=True))
    num_single = sum(w.numel() for w in shards.weights) - 7
    assert snapshot.num_bytes == 4 * num_single + 8 * 7
    assert snapshot.num_staging_bytes == 2 * 8 + 2 * 8


def test_staging_is_bounded_by_the_shards_too() -> None:
    shards = Shards()
    num = sum(w.numel() for w in shards.weights)
    assert HostSnapshot(shards).num_staging_bytes == 4 * (num + num % 2)
    assert HostSnapshot(shards, bucket_bytes=40).num_staging_bytes == 2 * 40


def test_shards_with_gaps_are_refused() -> None:
    shards = Shards()
    shards.weights[4] = shards.weights[4].T
    with pytest.raises(ValueError, match=r"strides \(1, 5\).*set sfpo.snapshot=device"):
        HostSnapshot(shards)


def test_not_with_restored_moments() -> None:
    SFPOConfig(snapshot="host", moments="reset")
    with pytest.raises(ValueError, match="'host', expected device with moments: restore"):
        SFPOConfig(snapshot="host", moments="restore")


# ---- two streams ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    position: int
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]


class Race:
    """Stands for `_SideStream`. AssertionError at an operation that touches what an operation of
    the other stream writes, or writes what that one reads, without having waited for it."""

    def __init__(self) -> None:
        self.operations: dict[str, list[Operation]] = {"current": [], "side": []}
        self.waited = {"current": 0, "side": 0}  # how much of the other stream is known to be done
        self.original_lerp = torch.lerp

    def operation(self, stream: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        mine = self.operations[stream]
        new = Operation(len(mine) + 1, [span(t) for t in reads], [span(t) for t in writes])
        other = "side" if stream == "current" else "current"
        for old in self.operations[other][self.waited[stream] :]:
            for a, b in [
                (new.reads, old.writes), (new.writes, old.reads), (new.writes, old.writes)
            ]:  # fmt: skip
                assert not any(overlap(x, y) for x in a for y in b), f"{stream}: {new} and {old}"
        mine.append(new)

    def copy(self, target: Tensor, source: Tensor, *, after: int | None) -> int:
        self.waited["side"] = max(self.waited["side"], after or 0)
        self.operation("side", [source], [target])
        target.copy_(source)
        return len(self.operations["side"])

    def mark(self) -> int:
        return len(self.operations["current"])

    def hold_current(self, mark: int | None) -> None:
        self.waited["current"] = max(self.waited["current"], mark or 0)

    def lerp(self, slow: Tensor, shard: Tensor, alpha: float, *, out: Tensor) -> Tensor:
        self.operation("current", [slow, shard], [out])
        return self.original_lerp(slow, shard, alpha, out=out)


def span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Race:
    race = Race()
    monkeypatch.setattr(host, "_SideStream", lambda device: race)
    monkeypatch.setattr(torch, "lerp", race.lerp)
    return race


def run_steps(race: Race, *, staged: bool, bucket_bytes: int) -> None:
    shards = Shards(staged=staged)
    snapshot = HostSnapshot(shards, bucket_bytes=bucket_bytes)
    shards.race = race
    for _ in range(2):
        sfpo_step(shards.step, snapshot, num_fast_passes=2, alpha=0.8)
    snapshot.reposition(0.5)
    snapshot.reposition(0.5)
    assert min(map(len, race.operations.values())) > 20


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("bucket_bytes", [12, 256])
def test_streams_wait_for_each_other(race: Race, staged: bool, bucket_bytes: int) -> None:
    run_steps(race, staged=staged, bucket_bytes=bucket_bytes)


def test_a_single_staged_shard_is_not_drawn_over_while_it_is_copied(race: Race) -> None:
    """Nor is a second one: no step between them, so nothing else waits for the copy."""
    shards = Shards(staged=True)
    del shards.weights[1:]
    snapshot = HostSnapshot(shards)
    shards.race = race
    snapshot.take()
    snapshot.reposition(0.8)
    snapshot.take()
    snapshot.take()


BREAKS = {
    "the optimizer step does not wait": ("finish_storing", "hold_current"),
    "drawing into a staging buffer does not wait": ("store", "hold_current"),
    "the copy out does not wait": ("store", "mark"),
    "the lerp does not wait for its bucket": ("lerp", "hold_current"),
    "a bucket is refilled before it is read": ("lerp", "mark"),
    "the next reposition does not wait": ("finish_fetching", "mark"),
}


@pytest.mark.parametrize("broken", list(BREAKS))
def test_every_wait_is_needed(race: Race, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Without it there is a race: in the method named, the stream's call does nothing."""
    method, call = BREAKS[broken]
    original = getattr(host._HostCopy, method)

    def patched(self: Any, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(race, call, lambda *_: None)
            original(self, *arguments)

    monkeypatch.setattr(host._HostCopy, method, patched)
    with pytest.raises(AssertionError, match="Operation"):
        run_steps(race, staged="staging" in broken, bucket_bytes=12)
