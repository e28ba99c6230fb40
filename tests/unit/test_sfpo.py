"""sfpo.py alone, on plain tensors: the update against closed forms.

Not exercised here: Megatron's optimizer and `publish` across ranks (tests/dist).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from made.shards import through_one_buffer
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step


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
    """Shards that are handed out through one buffer."""

    def tensors(self) -> Iterator[Tensor]:  # type: ignore[override]
        return through_one_buffer(self.held)


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
