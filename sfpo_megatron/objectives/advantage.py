"""Advantages of rollouts from their rewards, and which rollouts the loss takes in at all.

With m and s the mean and the unbiased standard deviation of the rewards of a group of G siblings:

    grpo          (r - m) / (s + eps)       GRPO, arXiv 2402.03300; without the division Dr.GRPO,
                                            arXiv 2503.20783
    rloo          r - mean of the G - 1 others = (r - m) * G / (G - 1)         arXiv 2402.14740
    reinforce_pp  (r - m) / (std of all r - m of the batch + eps)
                                            REINFORCE++ with baseline, arXiv 2501.03262

Each sums to 0 in every group, and in a group of equal rewards each is exactly 0, whatever the
reward and the group's size (`_centered`). rewards: [N] float, siblings adjacent. A user's own are
called and checked in the same way (`plugins.ADVANTAGE`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.objectives.checked import checked_advantages
from sfpo_megatron.plugins import ADVANTAGE
from sfpo_megatron.types import RolloutBatch

STD_EPS = 1e-6
"""Added to the standard deviation, as the released SFPO reference does."""


def grpo(rewards: Tensor, group_size: int, config: ObjectiveConfig) -> Tensor:
    """GRPO's advantages [N] of rewards [N]; with `normalize_std` off, Dr.GRPO's."""
    centered = _centered(rewards, group_size)
    if config.normalize_std:
        centered = centered / (centered.std(dim=1, keepdim=True) + STD_EPS)
    return centered.reshape(-1)


def rloo(rewards: Tensor, group_size: int, config: ObjectiveConfig) -> Tensor:
    """Leave-one-out advantages [N] of rewards [N]."""
    centered = _centered(rewards, group_size)
    return (centered * (group_size / (group_size - 1))).reshape(-1)


def reinforce_pp(rewards: Tensor, group_size: int, config: ObjectiveConfig) -> Tensor:
    """REINFORCE++'s advantages [N] of rewards [N], those of the whole rollout batch. Their mean is
    0."""
    centered = _centered(rewards, group_size).reshape(-1)
    return centered / (centered.std() + STD_EPS)


def advantages_of(rewards: Tensor, group_size: int, config: ObjectiveConfig) -> Tensor:
    """[N] float32, as `objective.advantage` names them; PluginError for what is none."""
    return checked_advantages(ADVANTAGE.load(config.advantage), rewards, group_size, config)


def zero_variance(rewards: Tensor, group_size: int) -> Tensor:
    """[N / G] bool: groups of equal rewards. They have no gradient; DAPO samples others instead."""
    groups = _groups(rewards, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def soft_overlong_penalty(lengths: Tensor, limit: int, config: ObjectiveConfig) -> Tensor:
    """[N] <= 0, to be added to the rewards (DAPO, arXiv 2503.14476, eq. 13): 0 up to
    limit - buffer_tokens response tokens, from there linearly to -penalty at the limit. Tokens that
    the model did not generate count too: they fill the room that the limit leaves."""
    buffer = config.overlong.buffer_tokens
    if buffer == 0:
        return torch.zeros(lengths.shape)
    into_buffer = (lengths - (limit - buffer)).clamp(0, buffer)
    return -config.overlong.penalty * into_buffer / buffer


def shaped_rewards(
    batch: RolloutBatch, limit: int, config: ObjectiveConfig, kl: Tensor | None = None
) -> Tensor:
    """[N]: what advantages are made of: the verifier's reward, the soft overlong penalty, and with
    `kl` [N], the KL of each rollout, its penalty."""
    rewards = batch.rewards + soft_overlong_penalty(batch.response_lengths, limit, config)
    return rewards if kl is None else rewards - (config.kl.coef * kl).to(rewards.dtype)


def in_loss(batch: RolloutBatch, config: ObjectiveConfig) -> Tensor:
    """[N] bool: the rollouts whose tokens enter the loss, its normalizer and its statistics."""
    chosen = torch.ones(batch.num_rollouts, dtype=torch.bool)
    if config.overlong.mask_truncated:
        chosen &= batch.finished
    if config.zero_variance_groups == "mask":
        same = zero_variance(batch.rewards, batch.group_size)
        chosen &= ~same.repeat_interleave(batch.group_size)
    return chosen


def _centered(rewards: Tensor, group_size: int) -> Tensor:
    """[N / G, G] r - m, exactly 0 where the rewards of a group are equal.

    A float32 mean of equal rewards is an ulp or so off, which the division by a standard deviation
    of 0 + eps makes an advantage of up to 0.2. Less its group's first reward, each of them is
    exactly 0, and so is their mean, in any dtype and in any order of the sum. float64, as nearly
    equal rewards differ by few float32 ulps; the rest is in the rewards' dtype, as the result is.
    """
    groups = _groups(rewards, group_size).double()
    shifted = groups - groups[:, :1]
    return (shifted - shifted.mean(dim=1, keepdim=True)).to(rewards.dtype)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make whole groups of {group_size}")
    return rewards.view(-1, group_size)
