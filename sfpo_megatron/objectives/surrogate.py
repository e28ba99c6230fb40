"""The clipped importance-ratio surrogate (PPO, arXiv 1707.06347) on packed tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, frozen=True, slots=True)
class SurrogateSums:
    """Sums over the response tokens of one microbatch; a global count turns them into means."""

    loss: Tensor  # [] differentiable
    ratio: Tensor  # []
    ppo_kl: Tensor  # [] of old - new log-prob, the k1 estimate of KL(old || new)
    clipped: Tensor  # [] tokens where the clip took the gradient away


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateSums:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), summed over the mask.

    All arguments [T]; the mask is bool. Masked positions may hold anything finite.
    """
    log_ratio = torch.where(loss_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = torch.where(loss_mask, -torch.minimum(free, bounded), 0.0)
    return SurrogateSums(
        loss=loss.sum(),
        ratio=torch.where(loss_mask, ratio, 0.0).sum().detach(),
        ppo_kl=-log_ratio.sum().detach(),
        clipped=((bounded < free) & loss_mask).sum(),
    )
