"""What a pass minimizes: token sums of a loss and its statistics, from log-probs and entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sfpo_megatron.config.tree import ObjectiveConfig
from sfpo_megatron.objectives.surrogate import ppo_clip
from sfpo_megatron.types import Microbatch


class Objective(Protocol):
    """Called once a microbatch, on the ranks of the last pipeline stage."""

    stat_names: ClassVar[tuple[str, ...]]
    """What the statistics are, in order; each becomes a mean over response tokens."""

    @property
    def with_entropy_grad(self) -> bool:
        """Whether the loss needs the gradient of the entropy."""

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses [], sums of the statistics [len(stat_names)])."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PolicyObjective:
    """The clipped surrogate with an optional entropy bonus."""

    stat_names: ClassVar[tuple[str, ...]] = ("ratio_mean", "ppo_kl", "clip_frac")
    config: ObjectiveConfig
    first_pass_is_old: bool = False
    """Where `old_logprobs` are not set yet, the log-probs of this forward become them. Only right
    with one minibatch a pass: no weight has moved then during the first one."""

    @property
    def with_entropy_grad(self) -> bool:
        return self.config.entropy_coef > 0

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        if microbatch.old_logprobs is None and self.first_pass_is_old:
            microbatch.old_logprobs = logprobs.detach()
        assert microbatch.old_logprobs is not None, "old_logprobs come before the first update"
        sums = ppo_clip(
            logprobs,
            microbatch.old_logprobs,
            microbatch.advantages,
            microbatch.loss_mask,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
        )
        loss = sums.loss
        if self.with_entropy_grad:
            bonus = torch.where(microbatch.loss_mask, entropy, 0.0).sum()
            loss = loss - self.config.entropy_coef * bonus
        return loss, torch.stack([sums.ratio, sums.ppo_kl, sums.clipped.float()])


@dataclass(kw_only=True, frozen=True, slots=True)
class NextTokenObjective:
    """Cross-entropy of the response tokens: the warm start."""

    stat_names: ClassVar[tuple[str, ...]] = ()
    with_entropy_grad: bool = False

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        loss = torch.where(microbatch.loss_mask, -logprobs, 0.0).sum()
        return loss, logprobs.new_zeros(0)
