"""Advantages, clipped surrogate and objective against float64 loops over single tokens.

Values and gradients on ragged packs. Not exercised here: the reduction over ranks (tests/dist).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfpo_megatron.batching import PackRow, pack
from sfpo_megatron.config.tree import ObjectiveConfig
from sfpo_megatron.objectives.advantage import grpo_advantages
from sfpo_megatron.objectives.objective import NextTokenObjective, PolicyObjective
from sfpo_megatron.objectives.surrogate import ppo_clip
from sfpo_megatron.types import Microbatch

# (prompt tokens, response tokens, advantage)
ROWS = [(3, 5, 1.3), (1, 1, -0.7), (6, 0, 2.0), (2, 9, -1.1), (4, 2, 0.0), (2, 7, 0.4)]


def ragged(seed: int) -> tuple[Microbatch, Tensor, Tensor]:
    """(pack with old_logprobs, new log-probs, entropies); ratios reach far beyond both clips."""
    random = torch.Generator().manual_seed(seed)
    rows = [
        PackRow(
            token_ids=torch.randint(1, 50, (p + r,), generator=random),
            prompt_length=p,
            advantage=a,
            generator_logprobs=torch.zeros(r),
        )
        for p, r, a in ROWS
    ]
    microbatch = pack(rows, 8)
    size = microbatch.token_ids.numel()
    microbatch.old_logprobs = -3 * torch.rand(size, generator=random)
    logprobs = microbatch.old_logprobs + 0.5 * torch.randn(size, generator=random)
    # Positions that no mask covers may hold anything finite.
    logprobs[~microbatch.loss_mask] = 60.0
    entropy = torch.rand(size, generator=random)
    return microbatch, logprobs.requires_grad_(), entropy.requires_grad_()


def by_token(
    microbatch: Microbatch, logprobs: Tensor, low: float, high: float
) -> tuple[float, list[float], float, float, int]:
    """(loss, its gradient by log-prob, sum of ratios, sum of old - new, clipped tokens)."""
    assert microbatch.old_logprobs is not None
    loss, ratios, kl, clipped = 0.0, 0.0, 0.0, 0
    grad = [0.0] * logprobs.numel()
    for t in range(logprobs.numel()):
        if not microbatch.loss_mask[t]:
            continue
        old, new = float(microbatch.old_logprobs[t]), float(logprobs[t])
        advantage = float(microbatch.advantages[t])
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 1 - low), 1 + high)
        if bounded * advantage < ratio * advantage:
            loss -= bounded * advantage
            clipped += 1
        else:
            loss -= ratio * advantage
            grad[t] = -ratio * advantage
        ratios += ratio
        kl += old - new
    return loss, grad, ratios, kl, clipped


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3), (0.0, 0.0)])
def test_surrogate_value_gradient_and_statistics(seed: int, low: float, high: float) -> None:
    microbatch, logprobs, _ = ragged(seed)
    assert microbatch.old_logprobs is not None
    sums = ppo_clip(
        logprobs, microbatch.old_logprobs, microbatch.advantages, microbatch.loss_mask,
        clip_low=low, clip_high=high,
    )  # fmt: skip
    sums.loss.backward()
    loss, grad, ratios, kl, clipped = by_token(microbatch, logprobs.detach(), low, high)
    assert sums.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor(grad), rtol=1e-5, atol=1e-6)
    assert sums.ratio.item() == pytest.approx(ratios, rel=1e-5)
    assert sums.ppo_kl.item() == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert int(sums.clipped) == clipped and 0 < clipped < int(microbatch.loss_mask.sum())
    assert not sums.ratio.requires_grad and not sums.ppo_kl.requires_grad


def test_first_pass_has_ratio_one_and_the_policy_gradient() -> None:
    microbatch, logprobs, entropy = ragged(1)
    microbatch.old_logprobs = logprobs.detach().clone()
    loss, stats = PolicyObjective(config=ObjectiveConfig())(logprobs, entropy, microbatch)
    count = int(microbatch.loss_mask.sum())
    ratio, kl, clip = stats.tolist()
    assert (ratio, kl, clip) == (count, 0.0, 0.0)
    loss.backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -microbatch.advantages * microbatch.loss_mask)


@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_entropy_bonus(coef: float) -> None:
    microbatch, logprobs, entropy = ragged(2)
    objective = PolicyObjective(config=ObjectiveConfig(entropy_coef=coef))
    assert objective.with_entropy_grad == (coef > 0)
    loss, stats = objective(logprobs, entropy, microbatch)
    plain = by_token(microbatch, logprobs.detach(), 0.2, 0.2)[0]
    bonus = entropy.detach().double()[microbatch.loss_mask].sum().item()
    assert loss.item() == pytest.approx(plain - coef * bonus, rel=1e-5)
    loss.backward()
    if coef:
        assert entropy.grad is not None
        torch.testing.assert_close(entropy.grad, -coef * microbatch.loss_mask.float())
    else:
        assert entropy.grad is None
    assert len(stats) == len(objective.stat_names)


def test_next_token_objective_is_the_negative_log_likelihood() -> None:
    microbatch, logprobs, entropy = ragged(3)
    loss, stats = NextTokenObjective()(logprobs, entropy, microbatch)
    wanted = -logprobs.detach().double()[microbatch.loss_mask].sum().item()
    assert loss.item() == pytest.approx(wanted)
    loss.backward()
    assert logprobs.grad is not None and torch.equal(logprobs.grad, -microbatch.loss_mask.float())
    assert stats.numel() == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_against_plain_arithmetic(normalize: bool) -> None:
    """Unbiased std (n - 1), eps added to the std; a group of equal rewards gives exactly zero."""
    groups = [[1.0, 0, 0, 1.0], [0.5, 0.5, 0.5, 0.5], [0, 0.1, 1.0, -2.0], [0, 0, 0, 1.0]]
    got = grpo_advantages(torch.tensor(groups).flatten(), 4, normalize_std=normalize).view(4, 4)
    for row, group in zip(got.tolist(), groups, strict=True):
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        wanted = [(r - mean) / (std + 1e-6) if normalize else r - mean for r in group]
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert got[1].tolist() == [0.0] * 4


def test_advantages_need_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"7 rewards .* groups of 4"):
        grpo_advantages(torch.zeros(7), 4)
