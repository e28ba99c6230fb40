"""What a pass minimizes: token sums of a loss and its statistics, from log-probs and entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.objectives.own_loss import policy_loss
from sfpo_megatron.objectives.sequences import Sequences
from sfpo_megatron.objectives.surrogate import (
    PolicyLoss,
    PolicyTokens,
    clipped,
    log_ratio_of,
    ratio_of,
)
from sfpo_megatron.types import Microbatch, Minibatch


class Objective(Protocol):
    """Called once a microbatch, on the ranks of the last pipeline stage."""

    stat_names: ClassVar[tuple[str, ...]]
    """What the statistics are, in order; each becomes a mean over response tokens."""

    @property
    def with_entropy_grad(self) -> bool:
        """Whether the loss needs the gradient of the entropy."""

    def normalizer(self, minibatch: Minibatch) -> int:
        """What the loss sum of all microbatches and ranks is divided by: the same on all ranks."""

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses [], sums of the statistics [len(stat_names)])."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PolicyObjective:
    """A policy loss (surrogate.py) and an optional entropy bonus, aggregated as configured."""

    stat_names: ClassVar[tuple[str, ...]] = ("ratio_mean", "ppo_kl", "clip_frac")
    config: ObjectiveConfig
    loss: PolicyLoss
    max_response_tokens: int
    """The constant of `aggregation: token_sum_norm`."""
    first_pass_is_old: bool = False
    """Where `old_logprobs` are not set yet, the log-probs of this forward become them. Only right
    with one minibatch a pass: no weight has moved then during the first one."""

    @staticmethod
    def of(config: RunConfig, *, first_pass_is_old: bool = False) -> PolicyObjective:
        """As `objective` asks for; ValueError for an `objective.loss` that cannot be had."""
        return PolicyObjective(
            config=config.objective,
            loss=policy_loss(config.objective.loss),
            max_response_tokens=config.rollout.max_response_tokens,
            first_pass_is_old=first_pass_is_old,
        )

    @property
    def with_entropy_grad(self) -> bool:
        return self.config.entropy_coef > 0

    def normalizer(self, minibatch: Minibatch) -> int:
        aggregation = self.config.aggregation
        if aggregation == "token_mean":
            return minibatch.global_valid_tokens
        constant = self.max_response_tokens if aggregation == "token_sum_norm" else 1
        return minibatch.global_num_sequences * constant

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        if microbatch.old_logprobs is None and self.first_pass_is_old:
            microbatch.old_logprobs = logprobs.detach()
        assert microbatch.old_logprobs is not None, "old_logprobs come before the first update"
        mask = microbatch.loss_mask
        sequences = Sequences(microbatch.cu_seqlens, mask)
        log_ratio = log_ratio_of(logprobs, microbatch.old_logprobs, mask)
        tokens = PolicyTokens(
            logprobs=logprobs,
            old_logprobs=microbatch.old_logprobs,
            ratio=ratio_of(log_ratio, sequences, self.config),
            advantages=microbatch.advantages,
            loss_mask=mask,
            sequences=sequences,
        )
        token_loss = self.loss(tokens, self.config)
        if token_loss.shape != mask.shape:
            raise ValueError(
                f"objective.loss: {self.config.loss} gave a shape {tuple(token_loss.shape)}, "
                f"expected one loss a token, {tuple(mask.shape)}"
            )
        loss = self._sum(torch.where(mask, token_loss, 0.0), sequences)
        if self.with_entropy_grad:
            bonus = self._sum(torch.where(mask, entropy, 0.0), sequences)
            loss = loss - self.config.entropy_coef * bonus
        low, high = clipped(tokens, self.config)
        ratio_sum = torch.where(mask, tokens.ratio, 0.0).sum().detach()
        return loss, torch.stack([ratio_sum, -log_ratio.sum().detach(), (low | high).sum().float()])

    def _sum(self, values: Tensor, sequences: Sequences) -> Tensor:
        """What `normalizer` turns into the aggregate; values [T] are 0 outside the mask."""
        if self.config.aggregation == "seq_mean_token_mean":
            return sequences.mean(values).sum()
        return values.sum()


@dataclass(kw_only=True, frozen=True, slots=True)
class NextTokenObjective:
    """Cross-entropy of the response tokens: the warm start."""

    stat_names: ClassVar[tuple[str, ...]] = ()
    with_entropy_grad: bool = False

    def normalizer(self, minibatch: Minibatch) -> int:
        return minibatch.global_valid_tokens

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        loss = torch.where(microbatch.loss_mask, -logprobs, 0.0).sum()
        return loss, logprobs.new_zeros(0)
