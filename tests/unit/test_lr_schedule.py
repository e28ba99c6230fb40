"""The learning rate at every tick against closed forms in Python floats, and what is refused.

Megatron's own scheduler runs here, on param groups without an optimizer; that a checkpoint brings
the tick back is in tests/dist/test_warm_start.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.training import OptimizerSection, SFTConfig, TrainConfig
from sfpo_megatron.mcore.schedule import LRSchedule, scheduler_of, sft_schedule, train_schedule

PEAK, FLOOR = 3e-4, 2e-5


def rates(schedule: LRSchedule, num_ticks: int, *, resume_at: int = 0) -> list[float]:
    """The rate of each train step; `resume_at`: a new scheduler goes on there, as `load` does."""

    def new() -> Any:
        optimizer: Any = SimpleNamespace(param_groups=[{}, {}])
        return scheduler_of(optimizer, schedule, 0.01)

    scheduler, found = new(), []
    for tick in range(1, num_ticks + 1):
        if resume_at and tick == resume_at + 1:
            saved, scheduler = scheduler.state_dict()["num_steps"], new()
            scheduler.num_steps = 0
            scheduler.step(increment=saved)
        scheduler.step(increment=1)
        first, second = (group["lr"] for group in scheduler.optimizer.param_groups)
        assert first == second
        found.append(first)
    return found


def expected(style: str, t: int, *, w: int, n: int, d: int) -> float:
    if w and t <= w:
        return PEAK * t / w
    if style == "constant":
        return PEAK
    if t > n:
        return FLOOR
    r = (t - w) / (n - w)
    left = {
        "linear": 1 - r,
        "cosine": (1 + math.cos(math.pi * r)) / 2,
        "wsd": min(1.0, (n - t) / d),
    }[style]
    return FLOOR + (PEAK - FLOOR) * left


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "wsd"])
def test_every_tick(style: str, warmup: int) -> None:
    decay = {"lr_decay_steps": 7} if style == "wsd" else {}
    optimizer = OptimizerSection(
        lr=PEAK, lr_schedule=style, lr_warmup_steps=warmup, lr_floor=FLOOR, **decay
    )
    train = TrainConfig(num_steps=20, optimizer=optimizer)
    found = rates(train_schedule(train), 23)
    wanted = [expected(style, t, w=warmup, n=20, d=7) for t in range(1, 24)]
    assert found == pytest.approx(wanted, rel=1e-12, abs=0)
    assert style == "constant" or found[19] == pytest.approx(FLOOR, rel=1e-12)
    assert rates(train_schedule(train), 23, resume_at=9) == found  # bit for bit
    assert rates(train_schedule(train), 23, resume_at=17) == found
    sft = SFTConfig(
        num_steps=20, lr=PEAK, lr_schedule=style, lr_warmup_steps=warmup, lr_floor=FLOOR, **decay
    )
    assert rates(sft_schedule(sft), 23) == found


def test_wsd_decays_over_a_tenth_by_default() -> None:
    optimizer = OptimizerSection(lr=PEAK, lr_schedule="wsd")
    found = rates(train_schedule(TrainConfig(num_steps=40, optimizer=optimizer)), 40)
    assert found[:36] == [PEAK] * 36
    assert found[36:] == pytest.approx([PEAK * f for f in (0.75, 0.5, 0.25, 0.0)], abs=1e-18)


@pytest.mark.parametrize(("num_steps", "warmup"), [(100, 0), (100, 10), (5, 9)])
def test_the_keys_of_before_mean_what_they_meant(num_steps: int, warmup: int) -> None:
    """`train`: constant behind lr_warmup_steps, which may be more than the run has. `sft`: a tenth
    of warm-up, cosine to 0. Bit for bit by the formulas of before."""
    optimizer = OptimizerSection(lr=1e-6, lr_warmup_steps=warmup)
    found = rates(train_schedule(TrainConfig(num_steps=num_steps, optimizer=optimizer)), num_steps)
    steps = range(1, num_steps + 1)
    assert found == [0.0 + 1e-6 * float(t) / float(warmup) if t <= warmup else 1e-6 for t in steps]
    sft = sft_schedule(SFTConfig(num_steps=num_steps, lr=1e-3))
    assert (sft.floor, sft.warmup_ticks, sft.style) == (0.0, num_steps // 10, "cosine")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a floor above the peak": ({"lr": 1e-6, "lr_floor": 1e-5}, r"lr_floor: found 1e-05.*1e-06"),
    "a negative floor": ({"lr_floor": -1e-9}, "lr_floor: found -1e-09"),
    "no decay at all": ({"lr_schedule": "wsd", "lr_decay_steps": 0}, "lr_decay_steps: found 0"),
    "a decay that cosine ignores": (
        {"lr_schedule": "cosine", "lr_decay_steps": 3},
        "lr_decay_steps: found 3, expected null with lr_schedule cosine",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str) -> None:
    fields, said = WRONG[case]
    with pytest.raises(FieldError, match=said):
        OptimizerSection(**fields)
    with pytest.raises(FieldError, match=said):
        SFTConfig(**fields)


@pytest.mark.parametrize("style", ["linear", "cosine", "wsd"])
def test_a_warm_up_that_leaves_no_room(style: str) -> None:
    fits, too_long = (
        OptimizerSection(lr_schedule=style, lr_warmup_steps=warmup) for warmup in (9, 10)
    )
    train = TrainConfig(num_steps=10, optimizer=fits)
    with pytest.raises(FieldError, match=r"num_steps: found 10, expected lr_warmup_steps \(10\)"):
        replace(train, optimizer=too_long)
    with pytest.raises(FieldError, match=r"num_steps: found 10, expected lr_warmup_steps \(10\)"):
        SFTConfig(num_steps=10, lr_schedule=style, lr_warmup_steps=10)
    unknown = TrainConfig(num_epochs=1, optimizer=too_long)  # until the rows have been counted
    with pytest.raises(FieldError, match="num_steps: found 10"):
        unknown.with_steps(10)
