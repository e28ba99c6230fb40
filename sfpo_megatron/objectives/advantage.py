"""Group-relative advantages (GRPO, arXiv 2402.03300): a rollout against its siblings."""

from __future__ import annotations

from torch import Tensor

STD_EPS = 1e-6
"""Added to the standard deviation, as the released SFPO reference does."""


def grpo_advantages(rewards: Tensor, group_size: int, *, normalize_std: bool = True) -> Tensor:
    """(reward - group mean) / (unbiased group std + 1e-6), or without the division (Dr.GRPO).

    rewards: [N] float, siblings adjacent. Returns [N].
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make whole groups of {group_size}")
    groups = rewards.view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std:
        centered = centered / (groups.std(dim=1, keepdim=True) + STD_EPS)
    return centered.reshape(-1)
