"""sfpo.py alone, on plain tensors: the update against closed forms, the gate against tables.

Not exercised here: Megatron's optimizer and `publish` across ranks (tests/dist).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sfpo_megatron.sfpo import EntropyGate, SlowSnapshot, sfpo_step


class Shards:
    """A list of tensors; counts what is published."""

    def __init__(self, *tensors: Tensor) -> None:
        self.held = list(tensors)
        self.published: list[list[Tensor]] = []

    def tensors(self) -> list[Tensor]:
        return self.held

    def publish(self) -> None:
        self.published.append([t.clone() for t in self.held])


def weights(seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in [(4, 3), (7,), (1,), (0,)]]


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_sgd_on_a_quadratic_in_closed_form(k: int, alpha: float) -> None:
    """A pass is SGD on |theta - c|^2 / 2, so theta - c shrinks by s = 1 - lr. After K fast passes,
    the reposition and the slow correction it is s (1 - alpha + alpha s^K) (theta_0 - c)."""
    lr, center = 0.3, 1.5
    start = weights()
    shards = Shards(*[t.clone() for t in start])

    def run_pass() -> int:
        for tensor in shards.tensors():
            tensor.sub_(lr * (tensor - center))
        return 0

    sfpo_step(run_pass, SlowSnapshot(shards), num_fast_passes=k, alpha=alpha)
    shrink = (1 - lr) * (1 - alpha + alpha * (1 - lr) ** k)
    for got, first in zip(shards.tensors(), start, strict=True):
        wanted = center + shrink * (first.double() - center)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    assert len(shards.published) == (k > 0)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_results_come_in_order_and_see_the_right_weights(k: int) -> None:
    shards = Shards(torch.zeros(3))
    seen: list[float] = []

    def run_pass() -> int:
        seen.append(shards.tensors()[0][0].item())
        shards.tensors()[0].add_(1.0)
        return len(seen)

    results = sfpo_step(run_pass, SlowSnapshot(shards), num_fast_passes=k, alpha=0.5)
    assert results == list(range(1, k + 2))
    assert seen == [*range(k), k * 0.5]


def a_pass(shards: Shards, seed: int) -> Callable[[], None]:
    random = torch.Generator().manual_seed(seed)

    def run_pass() -> None:
        for tensor in shards.tensors():
            tensor.add_(torch.randn(tensor.shape, generator=random))

    return run_pass


def test_alpha_one_and_zero_are_bit_exact() -> None:
    start = weights()
    shards, plain = Shards(*[t.clone() for t in start]), Shards(*[t.clone() for t in start])
    sfpo_step(a_pass(shards, 5), SlowSnapshot(shards), num_fast_passes=3, alpha=1.0)
    run_pass = a_pass(plain, 5)
    for _ in range(4):
        run_pass()
    assert all(torch.equal(a, b) for a, b in zip(shards.tensors(), plain.tensors(), strict=True))
    shards = Shards(*[t.clone() for t in start])
    sfpo_step(a_pass(shards, 5), SlowSnapshot(shards), num_fast_passes=3, alpha=0.0)
    assert all(torch.equal(a, b) for a, b in zip(shards.published[0], start, strict=True))


def test_snapshot_reuses_its_storage_and_edits_in_place() -> None:
    tensors = [*weights(), torch.randn(5, dtype=torch.float64)]
    shards = Shards(*tensors)
    snapshot = SlowSnapshot(shards)
    assert snapshot.num_bytes == 4 * (12 + 7 + 1) + 8 * 5
    storage = [slow.data_ptr() for slow, _ in snapshot._slow.paired(tensors)]
    for seed in range(3):
        sfpo_step(a_pass(Shards(*tensors[:4]), seed), snapshot, num_fast_passes=2, alpha=0.8)
    assert [slow.data_ptr() for slow, _ in snapshot._slow.paired(tensors)] == storage
    assert all(a is b for a, b in zip(shards.tensors(), tensors, strict=True))
    assert not set(storage) & {t.data_ptr() for t in tensors if t.numel()}


class StagedShards(Shards):
    """Every shard is drawn into one buffer and written back when the next one is drawn."""

    def tensors(self) -> Iterator[Tensor]:  # type: ignore[override]
        buffer = torch.empty(max(t.numel() for t in self.held))
        for tensor in self.held:
            staged = buffer[: tensor.numel()].view(tensor.shape)
            staged.copy_(tensor)
            yield staged
            tensor.copy_(staged)


def test_shards_drawn_into_one_buffer_are_written_back_to_the_last() -> None:
    start = weights()[:3]  # without the empty one
    plain, staged = Shards(*[t.clone() for t in start]), StagedShards(*[t.clone() for t in start])
    for shards in (plain, staged):
        snapshot = SlowSnapshot(shards)
        snapshot.take()
        for tensor in shards.held:
            tensor.mul_(1.1)
        snapshot.reposition(0.8)
    assert not any(torch.equal(a, b) for a, b in zip(plain.held, start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.held, staged.held, strict=True))


@pytest.mark.parametrize("change", [-1, 1])
def test_other_shards_than_at_first_are_an_error(change: int) -> None:
    shards = Shards(*weights())
    snapshot = SlowSnapshot(shards)
    shards.held = shards.held[:change] if change < 0 else [*shards.held, torch.ones(1)]
    with pytest.raises(ValueError, match="zip"):
        snapshot.take()


def test_each_step_starts_from_a_new_snapshot() -> None:
    shards = Shards(torch.zeros(2))
    snapshot = SlowSnapshot(shards)

    def run_pass() -> None:
        shards.tensors()[0].add_(1.0)

    for _ in range(3):  # each: +2 fast, back by half, +1
        sfpo_step(run_pass, snapshot, num_fast_passes=2, alpha=0.5)
    assert shards.tensors()[0].tolist() == [6.0, 6.0]


def decisions(gate: EntropyGate, entropies: list[float]) -> list[bool]:
    """Whether step 1, 2, ... is open, the entropy of each observed after it."""
    result = []
    for step, entropy in enumerate(entropies, start=1):
        result.append(gate.is_open(step))
        gate.observe(entropy)
    return [*result, gate.is_open(len(entropies) + 1)]


# Window 4. Newest value high in (1, 1, 1, 2): mean 1.25, population std 0.433, z = 1.732.
RISE, FALL = [1.0, 1.0, 1.0, 2.0], [2.0, 2.0, 2.0, 1.0]
BACK = [*RISE, 1.5, 1.4, 1.3, 1.2]  # z: 1.73, then 0.30, -0.21, -0.98, -1.34
OPEN, SHUT = True, False


@pytest.mark.parametrize(
    ("settings", "entropies", "expected"),
    [
        ({}, RISE, [OPEN] * 4 + [SHUT]),
        ({}, FALL, [OPEN] * 5),
        ({"two_sided": True}, FALL, [OPEN] * 4 + [SHUT]),
        ({}, RISE[:3], [OPEN] * 4),  # the window is not full
        ({}, BACK, [OPEN] * 4 + [SHUT] * 5),  # latched
        ({"latch": False}, BACK, [OPEN] * 4 + [SHUT] + [OPEN] * 4),
        ({"latch": False, "two_sided": True}, BACK, [OPEN] * 4 + [SHUT] + [OPEN] * 3 + [SHUT]),
        ({"zscore_threshold": 1.74}, RISE, [OPEN] * 5),
        ({"zscore_threshold": 1.73}, RISE, [OPEN] * 4 + [SHUT]),
        ({"stop_step": 3}, FALL, [OPEN] * 2 + [SHUT] * 3),
        ({"stop_step": 0}, [1.0], [SHUT] * 2),
        ({"stop_step": 1}, [1.0], [SHUT] * 2),
        ({}, [1.5] * 9, [OPEN] * 10),  # flat: z = 0, no division by zero
    ],
)
def test_gate_table(
    settings: dict[str, float], entropies: list[float], expected: list[bool]
) -> None:
    gate = EntropyGate(**{"window": 4, "zscore_threshold": 1.0, **settings})  # type: ignore[arg-type]
    assert decisions(gate, entropies) == expected


def test_zscore_is_over_the_window_with_the_newest_and_population_std() -> None:
    gate = EntropyGate(window=4)
    for entropy in [9.0, 1.0, 1.0, 1.0]:
        gate.observe(entropy)
    gate.observe(2.0)  # 9.0 has left the window
    assert gate.zscore == pytest.approx(0.75 / math.sqrt(0.1875), rel=1e-6)


def test_there_is_no_zscore_before_the_window_is_full() -> None:
    """A jump before that closes nothing."""
    gate = EntropyGate(window=4)
    for entropy in [1.0, 1.0, 5.0]:
        gate.observe(entropy)
        assert gate.zscore is None and gate.is_open(1)
    gate.observe(1.0)
    assert gate.zscore is not None and gate.is_open(1)


def test_default_is_the_reference_window_of_30() -> None:
    gate = EntropyGate()
    assert decisions(gate, [1.0] * 29 + [1.1])[-2:] == [OPEN, SHUT]


@pytest.mark.parametrize("latch", [False, True])
@pytest.mark.parametrize("cut", [2, 5, 7])
def test_state_round_trip_decides_the_same(cut: int, latch: bool) -> None:
    """With latch the state alone knows what closed the gate, once that has left the window."""
    whole, first = EntropyGate(window=4, latch=latch), EntropyGate(window=4, latch=latch)
    for entropy in BACK[:cut]:
        first.observe(entropy)
        whole.observe(entropy)
    second = EntropyGate(window=4, latch=latch)
    second.observe(123.0)  # what it held is forgotten
    second.load_state_dict(first.state_dict())
    for step, entropy in enumerate(BACK[cut:], start=cut + 1):
        assert second.is_open(step) == whole.is_open(step)
        second.observe(entropy)
        whole.observe(entropy)
        assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_a_non_finite_entropy_is_refused(entropy: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        EntropyGate().observe(entropy)
