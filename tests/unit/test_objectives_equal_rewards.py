"""Equal rewards have advantages of exactly 0; nearly equal ones those of float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ragged import GROUP_SIZE, ragged

from sfpo_megatron.config.objective import KLConfig, ObjectiveConfig, OverlongConfig
from sfpo_megatron.objectives.advantage import STD_EPS, advantages_of, shaped_rewards

KINDS: list[dict[str, Any]] = [
    {"advantage": "grpo"},
    {"advantage": "grpo", "normalize_std": False},
    {"advantage": "rloo"},
    {"advantage": "reinforce_pp"},
]
SIZES = range(2, 65)
REWARDS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def assert_all_zero(reward: float) -> None:
    """Every advantage of every group size."""
    for size in SIZES:
        rewards = torch.full((3 * size,), reward)
        for kind in KINDS:
            found = advantages_of(rewards, size, ObjectiveConfig(**kind))
            assert not found.any(), (reward, size, kind, found)


@pytest.mark.parametrize("reward", [0.1, 0.9, 1 / 3, -0.7, 1.0, 1e-40, 1e-45, 1e30, -3e38], ids=str)
def test_equal_rewards(reward: float) -> None:
    assert_all_zero(reward)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(reward=REWARDS)
def test_any_equal_rewards(reward: float) -> None:
    assert_all_zero(reward)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rewards=st.lists(REWARDS, min_size=4, max_size=4), size=st.sampled_from(SIZES))
@example(rewards=[0.1, 0.9, 1e30, 1e-45], size=3)
def test_each_group_by_itself(rewards: list[float], size: int) -> None:
    """Groups of equal rewards that differ from one another: reinforce_pp divides by the batch's."""
    flat = torch.tensor(rewards).repeat_interleave(size)
    for kind in KINDS:
        assert not advantages_of(flat, size, ObjectiveConfig(**kind)).any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_after_shaping(kind: dict[str, Any]) -> None:
    """The overlong penalty of siblings that are equally long, and a KL that is the same."""
    batch = ragged(0, equal_lengths=11).batch
    rewards = torch.tensor([0.1, 0.9, 1 / 3, 0.7]).repeat_interleave(GROUP_SIZE)
    config = ObjectiveConfig(
        **kind,
        overlong=OverlongConfig(buffer_tokens=7, penalty=0.3),
        kl=KLConfig(coef=0.1, where="reward"),
    )
    kl = torch.tensor([0.3, 1 / 7, 2.0, 1e-9]).double().repeat_interleave(GROUP_SIZE)
    shaped = shaped_rewards(replace(batch, rewards=rewards), 12, config, kl)
    assert (shaped < rewards).all()
    assert not advantages_of(shaped, GROUP_SIZE, config).any()


def plain(rewards: list[float], size: int, kind: dict[str, Any]) -> list[float]:
    """Means and sums of squares without rounding, then float64."""
    exact = [Fraction(reward) for reward in rewards]
    groups = [exact[i : i + size] for i in range(0, len(exact), size)]
    centered = [[r - sum(group) / size for r in group] for group in groups]
    flat = [c for group in centered for c in group]
    if kind["advantage"] == "rloo":
        return [float(c * size / (size - 1)) for c in flat]
    if not kind.get("normalize_std", True):
        return [float(c) for c in flat]

    def std(values: list[Fraction]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    if kind["advantage"] == "reinforce_pp":
        return [float(c) / (std(flat) + STD_EPS) for c in flat]
    return [float(c) / (std(group) + STD_EPS) for group in centered for c in group]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [2, 3, 8, 37, 64])
def test_nearly_equal_rewards(kind: dict[str, Any], size: int) -> None:
    """They differ by a few float32 ulps around 0.1, and by 1e-4. Bound 1e-5: float32's own 6e-8
    over sums of up to 128 values."""
    random = torch.Generator().manual_seed(size)
    near = torch.full((size,), 0.1)
    near += torch.randint(-3, 4, (size,), generator=random) * 2.0**-27
    further = 0.9 + 1e-4 * torch.randn(size, generator=random)
    rewards = torch.cat([near, further])
    assert near.unique().numel() > 1
    found = advantages_of(rewards, size, ObjectiveConfig(**kind))
    assert found.tolist() == pytest.approx(plain(rewards.tolist(), size, kind), rel=1e-5, abs=1e-12)
