"""Weights against the gap between what the engine sampled from and the trainer's old policy.

The engine samples from mu (other kernels, maybe another precision), not from pi_old. Off by
default.

    g_t   = log pi_old(y_t) - log mu(y_t)
    rho_t = exp(g_t)                         weight: token        truncated importance sampling
    rho_t = exp(sum of g over the response)  weight: sequence
    w_t   = min(rho_t, max_weight)

    reject: token     w_t = 0 where exp(g_t) is outside [low, high]; with weight: token and
                      max_weight >= high this is IcePop, arXiv 2510.18855
    reject: sequence  w_t = 0 for all tokens of a response whose exp(mean of g) is outside

The policy loss of a token is multiplied by w_t, without gradient. Rejected tokens stay in the
normalizer, as in the papers' formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ImportanceSamplingConfig
from sfpo_megatron.objectives.finite import finite
from sfpo_megatron.objectives.sequences import Sequences


@torch.no_grad()
def mismatch_weights(
    old_logprobs: Tensor,
    generator_logprobs: Tensor,
    loss_mask: Tensor,
    sequences: Sequences,
    config: ImportanceSamplingConfig,
) -> tuple[Tensor, Tensor]:
    """(w [T], rejected [T] bool); outside the mask 1 and False."""
    gap = torch.where(loss_mask, finite(old_logprobs) - finite(generator_logprobs), 0.0)
    weights = torch.ones_like(gap)
    if config.weight == "token":
        weights = gap.exp().clamp(max=config.max_weight)
    elif config.weight == "sequence":
        total = sequences.on_tokens(sequences.sum(gap))
        weights = torch.where(loss_mask, total.exp().clamp(max=config.max_weight), 1.0)
    rejected = torch.zeros_like(loss_mask)
    if config.reject != "none":
        if config.reject == "sequence":
            gap = sequences.on_tokens(sequences.mean(gap))
        ratio = gap.exp()
        rejected = ((ratio < config.low) | (ratio > config.high)) & loss_mask
    return weights.masked_fill(rejected, 0.0), rejected
