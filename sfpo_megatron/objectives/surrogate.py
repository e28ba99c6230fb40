"""The policy loss of a pack, token by token: one importance ratio, bounded in one of three ways.

d_t = log pi(y_t) - log pi_old(y_t)
r_t = exp(d_t)                                      ratio: token; d_t at most 20 (finite.py)
r_t = exp(mean of d over the response of t)         ratio: sequence     GSPO, arXiv 2507.18071
c_t = clip(r_t, 1 - clip_low, 1 + clip_high)        clip_high > clip_low: DAPO, arXiv 2503.14476

ppo_clip   l_t = -min(r_t A_t, c_t A_t)                                 PPO, arXiv 1707.06347
           l_t = min(l_t, -dual_clip A_t) where A_t < 0                 arXiv 1912.09729
cispo      l_t = -stop_gradient(c_t) A_t log pi(y_t)                    arXiv 2506.13585
no_clip    l_t = -r_t A_t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.objectives.finite import bounded, finite
from sfpo_megatron.objectives.sequences import Sequences


@dataclass(kw_only=True, frozen=True, slots=True)
class PolicyTokens:
    """What a policy loss is made of. Positions outside `loss_mask` have ratio 1 and advantage 0;
    their log-probs may be anything finite, and what a loss says there is dropped."""

    logprobs: Tensor  # [T] differentiable
    old_logprobs: Tensor  # [T]
    ratio: Tensor  # [T] differentiable, r_t above as `objective.ratio` asks for
    advantages: Tensor  # [T]
    loss_mask: Tensor  # [T] bool
    sequences: Sequences


Statistics = dict[str, Tensor]
"""A value a token [T] by name; its mean over the trained tokens is logged as `pass_k/NAME`."""

PolicyLoss = Callable[[PolicyTokens, ObjectiveConfig], Tensor | tuple[Tensor, Statistics]]
"""Token losses [T], unreduced, alone or with statistics: `plugins.LOSS`."""


def log_ratio_of(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """d_t = logprobs - old_logprobs [T], 0 outside the mask."""
    return torch.where(loss_mask, finite(logprobs) - finite(old_logprobs), 0.0)


def ratio_of(log_ratio: Tensor, sequences: Sequences, config: ObjectiveConfig) -> Tensor:
    """r_t [T] of d_t [T]: a token's own, or its sequence's (`objective.ratio`)."""
    if config.ratio == "sequence":
        log_ratio = sequences.on_tokens(sequences.mean(log_ratio))
    return bounded(log_ratio).exp()


def ppo_clip(tokens: PolicyTokens, config: ObjectiveConfig) -> tuple[Tensor, Statistics]:
    free = tokens.ratio * tokens.advantages
    loss = -torch.minimum(free, _clip(tokens.ratio, config) * tokens.advantages)
    if config.dual_clip is not None:
        most = -config.dual_clip * tokens.advantages
        loss = torch.where(tokens.advantages < 0, torch.minimum(loss, most), loss)
    return loss, _without_gradient(tokens, config)


def cispo(tokens: PolicyTokens, config: ObjectiveConfig) -> tuple[Tensor, Statistics]:
    loss = -_clip(tokens.ratio.detach(), config) * tokens.advantages * tokens.logprobs
    return loss, outside_bounds(tokens, config)


def no_clip(tokens: PolicyTokens, config: ObjectiveConfig) -> tuple[Tensor, Statistics]:
    never = torch.zeros_like(tokens.loss_mask)
    return -tokens.ratio * tokens.advantages, {"clip_frac_low": never, "clip_frac_high": never}


def outside_bounds(tokens: PolicyTokens, config: ObjectiveConfig) -> Statistics:
    """Tokens whose ratio is beyond either bound: what is said of a loss that does not say itself
    what it clipped."""
    ratio = tokens.ratio.detach()
    return {
        "clip_frac_low": ratio < 1.0 - config.clip_low,
        "clip_frac_high": ratio > 1.0 + config.clip_high,
    }


@torch.no_grad()
def _without_gradient(tokens: PolicyTokens, config: ObjectiveConfig) -> Statistics:
    """Tokens that lost their gradient under ppo_clip, to either bound or to the dual clip."""
    ratio, advantages = tokens.ratio, tokens.advantages
    lost = _clip(ratio, config) * advantages < ratio * advantages
    low, high = lost & (advantages < 0), lost & (advantages > 0)
    if config.dual_clip is not None:
        high |= (advantages < 0) & (ratio > config.dual_clip)
    return {"clip_frac_low": low, "clip_frac_high": high}


def _clip(ratio: Tensor, config: ObjectiveConfig) -> Tensor:
    return ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
