"""Advantages, the overlong penalty and the choice of rollouts, against plain arithmetic."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from ragged import GROUP_SIZE, ragged

from sfpo_megatron.config.objective import ObjectiveConfig, OverlongConfig
from sfpo_megatron.objectives.advantage import (
    advantages_of,
    grpo,
    in_loss,
    soft_overlong_penalty,
    zero_variance,
)

GROUPS = [[1.0, 0, 0, 1.0], [0.5, 0.5, 0.5, 0.5], [0, 0.1, 1.0, -2.0], [0, 0, 0, 1.0]]


def plain(config: ObjectiveConfig) -> list[list[float]]:
    """Unbiased standard deviations (n - 1), eps added to them."""
    centered = [[r - sum(group) / 4 for r in group] for group in GROUPS]
    if config.advantage == "rloo":
        return [[r - (sum(group) - r) / 3 for r in group] for group in GROUPS]
    if config.advantage == "reinforce_pp":
        std = statistics.stdev(c for group in centered for c in group)
        return [[c / (std + 1e-6) for c in group] for group in centered]
    if not config.normalize_std:
        return centered
    return [
        [c / (math.sqrt(sum(x * x for x in group) / 3) + 1e-6) for c in group] for group in centered
    ]


SETTINGS = [
    {"advantage": "grpo"},
    {"advantage": "grpo", "normalize_std": False},
    {"advantage": "rloo"},
    {"advantage": "reinforce_pp"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_against_plain_arithmetic(settings: dict[str, Any]) -> None:
    """And a group of equal rewards gives exactly zero."""
    config = ObjectiveConfig(**settings)
    got = advantages_of(torch.tensor(GROUPS).flatten(), 4, config).view(4, 4)
    for row, wanted in zip(got.tolist(), plain(config), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert got[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sums_to_zero_in_a_group(settings: dict[str, Any]) -> None:
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(0))
    sums = advantages_of(rewards, 8, ObjectiveConfig(**settings)).view(8, 8).sum(dim=1)
    assert sums.abs().max() < 1e-5


def test_reinforce_pp_has_unit_variance_over_the_batch() -> None:
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(1))
    found = advantages_of(rewards, 8, ObjectiveConfig(advantage="reinforce_pp"))
    assert found.std().item() == pytest.approx(1, abs=1e-4)


def test_rloo_ignores_its_own_reward_in_the_baseline() -> None:
    """Raising one reward by 1 raises its own advantage by 1 and lowers each sibling's by 1/3."""
    config, rewards = ObjectiveConfig(advantage="rloo"), torch.tensor([0.2, 0.7, 0.1, 0.4])
    before = advantages_of(rewards, 4, config)
    after = advantages_of(rewards + torch.tensor([0.0, 1, 0, 0]), 4, config)
    torch.testing.assert_close(after - before, torch.tensor([-1 / 3, 1.0, -1 / 3, -1 / 3]))


def test_whole_groups_are_needed() -> None:
    with pytest.raises(ValueError, match=r"7 rewards .* groups of 4"):
        grpo(torch.zeros(7), 4, ObjectiveConfig())
    with pytest.raises(ValueError, match=r"7 rewards .* groups of 4"):
        zero_variance(torch.zeros(7), 4)


def test_groups_of_equal_rewards() -> None:
    """0.1 is no binary fraction: a standard deviation of eight of them need not be 0."""
    rewards = torch.tensor([0.1] * 8 + [0.1] * 7 + [0.2])
    assert zero_variance(rewards, 8).tolist() == [True, False]


@pytest.mark.parametrize(("length", "wanted"), [(1, 0.0), (16, 0.0), (17, -0.125), (20, -0.5)])
def test_soft_overlong_penalty(length: int, wanted: float) -> None:
    """Limit 20, buffer 4, penalty 0.5: DAPO's eq. 13."""
    config = ObjectiveConfig(overlong=OverlongConfig(buffer_tokens=4, penalty=0.5))
    assert soft_overlong_penalty(torch.tensor([length]), 20, config).tolist() == [wanted]
    assert soft_overlong_penalty(torch.tensor([length]), 20, ObjectiveConfig()).tolist() == [0.0]


@pytest.mark.parametrize("mask_truncated", [True, False])
@pytest.mark.parametrize("groups", ["keep", "mask"])
def test_rollouts_that_the_loss_takes_in(mask_truncated: bool, groups: Any) -> None:
    batch = ragged(0).batch
    assert 0 < batch.finished.sum() < batch.num_rollouts
    config = ObjectiveConfig(
        zero_variance_groups=groups, overlong=OverlongConfig(mask_truncated=mask_truncated)
    )
    for index, chosen in enumerate(in_loss(batch, config).tolist()):
        start = index // GROUP_SIZE * GROUP_SIZE
        same = len(set(batch.rewards[start : start + GROUP_SIZE].tolist())) == 1
        dropped = (mask_truncated and not batch.finished[index]) or (groups == "mask" and same)
        assert chosen == (not dropped)
