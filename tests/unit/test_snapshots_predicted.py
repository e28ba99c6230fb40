"""PrePO's reposition on plain tensors: the rule in float64, trajectories that it knows, its ends.

Megatron's optimizers and the reduction over ranks: tests/dist/test_predicted.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import pytest
import torch
from made.bits import all_same_bits, clones
from made.prepo import predicted
from made.shards import through_one_buffer
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, Snapshot, sfpo_step
from sfpo_megatron.snapshots.predicted import PredictedSnapshot, Scales, predicted_scale

SHAPES = [(40, 30), (70,), (1,), (0,)]
LR, DECAY = 1e-3, 0.3
ALPHA = 0.8


class Shards:
    """Weights of one rank, whose optimizer steps call a hook; every second one decays."""

    def __init__(self, *tensors: Tensor, lr: float = LR, decay: float = DECAY) -> None:
        self.held = list(tensors)
        self.lr, self.decay = lr, decay
        self.num_published = 0
        self.hooks: list[Callable[[], None]] = []

    def tensors(self) -> Iterator[Tensor]:
        yield from self.held

    def publish(self) -> None:
        self.num_published += 1

    def before_step(self, callback: Callable[[], None]) -> None:
        self.hooks.append(callback)

    def decays(self) -> Sequence[float]:
        return [self.lr * self.decay * (index % 2) for index in range(len(self.held))]

    def means(self, sums: Tensor) -> Tensor:
        return sums / torch.tensor([float(max(1, t.numel())) for t in self.held])

    def step(self, directions: Sequence[Tensor]) -> None:
        for hook in self.hooks:
            hook()
        for tensor, direction, decay in zip(self.held, directions, self.decays(), strict=True):
            tensor.mul_(1 - decay).sub_(self.lr * direction)


class Staged(Shards):
    """Shards that are handed out through one buffer."""

    def tensors(self) -> Iterator[Tensor]:
        return through_one_buffer(self.held)


def noise(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=random) for shape in SHAPES]
    return [*found, torch.randn((6, 5), generator=random).t()]  # the last is not contiguous


def a_pass(shards: Shards, num_steps: int, skipped: Sequence[int] = ()) -> Callable[[], None]:
    """`num_steps` steps in random directions; those of the `skipped` numbers are not made."""
    numbers = count()

    def run_pass() -> None:
        for number in islice(numbers, num_steps):
            if number not in skipped:
                shards.step(noise(100 + number))

    return run_pass


def one_step(
    shards: Shards, snapshot: Snapshot, run_pass: Callable[[], None], alpha: float = ALPHA
) -> list[list[Tensor]]:
    """theta_0, theta_1, theta_2, theta_a and the weights at the end."""
    seen: list[list[Tensor]] = []

    def watched() -> None:
        seen.append(clones(shards.held))
        run_pass()
        if len(seen) == 2:
            seen.append(clones(shards.held))

    sfpo_step(watched, snapshot, num_fast_passes=2, alpha=alpha)
    return [*seen, clones(shards.held)]


@pytest.mark.parametrize("horizon", [3, 5, 10])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("kind", [Shards, Staged])
def test_the_rule_in_float64(horizon: int, num_steps: int, kind: type[Shards]) -> None:
    """Two train steps in random directions, which meet every bound of r and q."""
    shards = kind(*noise(1))
    snapshot = PredictedSnapshot(shards, horizon=horizon, steps_per_pass=num_steps, scales=Scales())
    run_pass = a_pass(shards, num_steps)
    for _ in range(2):
        *three, found, _ = one_step(shards, snapshot, run_pass)
        for index, decay in enumerate(shards.decays()):
            weights = [each[index] for each in three]
            left = (1 - decay) ** num_steps
            wanted = predicted(weights, decay=left, horizon=horizon, alpha=ALPHA)
            torch.testing.assert_close(found[index].double(), wanted, rtol=0, atol=5e-7)
            plain = torch.lerp(weights[0], weights[2], ALPHA)
            assert index > 1 or (found[index] - plain).abs().max() > 0.1 * LR
    assert shards.num_published == 2


@pytest.mark.parametrize("horizon", [3, 7])
def test_a_linear_trajectory_is_predicted_exactly(horizon: int) -> None:
    """SGD on a quadratic, another curvature in each coordinate: every pass goes r times as far as
    the one before. The reposition is that of SFPO with all K passes really made."""
    found = []
    for num_passes in (2, horizon):
        shards = Shards(*(t.double() for t in noise(1)), lr=0.5, decay=0.0)
        curvatures = [0.1 + t.double().abs().clamp(max=1.8) for t in noise(2)]
        snapshot: Snapshot = SlowSnapshot(shards)
        if num_passes == 2:
            snapshot = PredictedSnapshot(shards, horizon=horizon, steps_per_pass=1, scales=Scales())
        snapshot.take()
        for _ in range(num_passes):
            pairs = zip(shards.held, curvatures, strict=True)
            shards.step([curvature * (weight - 9) for weight, curvature in pairs])
        snapshot.reposition(ALPHA)
        found.append(shards.held)
    for predicted_one, real in zip(*found, strict=True):
        torch.testing.assert_close(predicted_one, real, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("horizon", "skipped", "lr"),
    [(2, (), LR), (5, (0,), LR), (5, (1,), LR), (5, (2,), LR), (5, (3,), LR), (5, (), 0.0)],
)
def test_without_a_prediction_it_is_sfpo_bit_for_bit(
    horizon: int, skipped: tuple[int, ...], lr: float
) -> None:
    """K = 2, an optimizer step skipped in either pass, and lr 0."""
    found = []
    for predicts in (True, False):
        shards = Shards(*noise(1), lr=lr)
        snapshot: Snapshot = SlowSnapshot(shards)
        if predicts:
            snapshot = PredictedSnapshot(shards, horizon=horizon, steps_per_pass=2, scales=Scales())
        run_pass = a_pass(shards, 2, skipped)
        steps = [one_step(shards, snapshot, run_pass) for _ in range(1 + (horizon == 2))]
        found.append([tensor for step in steps for each in step for tensor in each])
    assert all_same_bits(*found)
    assert lr == 0 or not all_same_bits(steps[0][3], steps[0][2])


def test_a_train_step_after_a_skipped_one_predicts_again() -> None:
    """Also after plain steps, in which nothing is taken: the gate was closed."""
    shards = Shards(*noise(1))
    snapshot = PredictedSnapshot(shards, horizon=5, steps_per_pass=2, scales=Scales())
    run_pass = a_pass(shards, 2, skipped=(0,))
    one_step(shards, snapshot, run_pass)
    run_pass()
    *three, found, _ = one_step(shards, snapshot, run_pass)
    wanted = predicted([each[0] for each in three], decay=1.0, horizon=5, alpha=ALPHA)
    torch.testing.assert_close(found[0].double(), wanted, rtol=0, atol=5e-7)


def test_it_holds_two_copies() -> None:
    """Both are of no use between a reposition and the next `take`, and can be given away."""
    shards = Shards(*noise(1))
    snapshot = PredictedSnapshot(shards, horizon=5, steps_per_pass=1, scales=Scales())
    assert snapshot.num_bytes == 2 * SlowSnapshot(shards).num_bytes
    assert sum(buffer.nbytes for buffer in snapshot.buffers()) == snapshot.num_bytes


@pytest.mark.parametrize(
    ("d_0", "d_1", "scale"),
    [
        (1.0, 0.5, (1 + 0.5 + 0.25 + 0.125) / 1.5),
        (1.0, 1.0, 2.0),  # K / 2
        (1.0, 9.0, 3.0),  # r is 3: 40 / 4, but at most K / 2 + 1
        (1.0, -0.5, 1.25),  # 0.625 / 0.5
        (1.0, -9.0, 3.0),  # r is -2: -5 / -1, but at most 3
        (1.0, -1.0, 1.0),  # S_2 is 0
        (0.1, 5.0, 1.0),  # not above the least
        (0.0, 0.0, 1.0),
        (1.0, 0.0, 1.0),
    ],
)
def test_the_scale_of_one_coordinate(d_0: float, d_1: float, scale: float) -> None:
    found = predicted_scale(torch.tensor([d_0]), torch.tensor([d_1]), least=0.1, horizon=4)
    assert found.item() == pytest.approx(scale, rel=1e-6)


def test_statistics_of_the_scale() -> None:
    """Over the elements of all shards in pieces; forgotten once taken. K is 4: at most 3."""
    scales = Scales()
    for q in ([1.0, 3.0, 2.0], [1.0, 1.5]):
        scales.see(torch.tensor(q), horizon=4)
    sums, largest = scales.take()
    assert sums.tolist() == [5, 8.5, 1, 2] and largest.tolist() == [3]
    assert [t.tolist() for t in scales.take()] == [[0, 0, 0, 0], [1]]


@pytest.mark.parametrize("skipped", [(), (1,)])
def test_every_element_is_counted_where_one_is_predicted(skipped: tuple[int, ...]) -> None:
    shards, scales = Shards(*noise(1)), Scales()
    snapshot = PredictedSnapshot(shards, horizon=5, steps_per_pass=1, scales=scales)
    one_step(shards, snapshot, a_pass(shards, 1, skipped))
    sums, largest = scales.take()
    count, total, clipped, ones = sums.tolist()
    assert count == (0 if skipped else sum(t.numel() for t in shards.held))
    assert total == 0 if skipped else count < total < 3.5 * count
    assert 0 <= clipped + ones <= count and largest.item() == (1 if skipped else 3.5)
