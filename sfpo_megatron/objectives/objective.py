"""What a pass minimizes: token sums of a loss and its statistics, from log-probs and entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.objectives.kl import kl_estimate
from sfpo_megatron.objectives.mismatch import mismatch_weights
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


@dataclass(kw_only=True, frozen=True, slots=True)
class ObjectiveTerms:
    """What an objective finds in one microbatch."""

    loss: Tensor  # [] sum of the token losses, differentiable
    sums: Tensor  # [len(stat_names)]
    maxima: Tensor  # [len(max_names)]


class Objective(Protocol):
    """Called once a microbatch, on the ranks of the last pipeline stage."""

    @property
    def stat_names(self) -> tuple[str, ...]:
        """What `sums` are, in order; each becomes a mean over response tokens."""

    @property
    def max_names(self) -> tuple[str, ...]:
        """What `maxima` are, in order: of values >= 0."""

    @property
    def temperature(self) -> float:
        """The log-probs and entropies it is given are of logits / temperature."""

    @property
    def with_entropy_grad(self) -> bool:
        """Whether the loss needs the gradient of the entropy."""

    def normalizer(self, minibatch: Minibatch) -> int:
        """What the loss sum of all microbatches and ranks is divided by: the same on all ranks."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        """logprobs, entropy: [T]."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PolicyObjective:
    """A policy loss (surrogate.py), and optionally an entropy bonus and a KL penalty, aggregated as
    configured."""

    max_names: ClassVar[tuple[str, ...]] = ("ratio_max",)
    config: ObjectiveConfig
    loss: PolicyLoss
    max_response_tokens: int
    """The constant of `aggregation: token_sum_norm`."""
    temperature: float
    """The temperature that the responses were sampled at."""
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
            temperature=config.rollout.temperature,
            first_pass_is_old=first_pass_is_old,
        )

    @property
    def stat_names(self) -> tuple[str, ...]:
        mismatch = ("mismatch_weight_mean", "mismatch_rejected")
        return (
            *("ratio_mean", "ppo_kl", "clip_frac_low", "clip_frac_high"),
            *(mismatch if self.config.importance_sampling.is_on else ()),
            *(("ref_kl",) if self.config.kl.coef else ()),
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

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        if microbatch.old_logprobs is None and self.first_pass_is_old:
            microbatch.old_logprobs = logprobs.detach()
        assert microbatch.old_logprobs is not None, "old_logprobs come before the first update"
        config, mask, old = self.config, microbatch.loss_mask, microbatch.old_logprobs
        sequences = Sequences(microbatch.cu_seqlens, mask)
        log_ratio = log_ratio_of(logprobs, old, mask)
        tokens = PolicyTokens(
            logprobs=logprobs,
            old_logprobs=old,
            ratio=ratio_of(log_ratio, sequences, config),
            advantages=microbatch.advantages,
            loss_mask=mask,
            sequences=sequences,
        )
        token_loss = self._token_loss(tokens)
        ratio = torch.where(mask, tokens.ratio.detach(), 0.0)
        stats = [ratio, -log_ratio.detach(), *clipped(tokens, config)]
        if config.importance_sampling.is_on:
            weights, rejected = mismatch_weights(
                old, microbatch.generator_logprobs, mask, sequences, config.importance_sampling
            )
            token_loss = token_loss * weights
            stats += [torch.where(mask, weights, 0.0), rejected]
        loss = self._sum(token_loss, sequences)
        if self.with_entropy_grad:
            bonus = self._sum(torch.where(mask, entropy, 0.0), sequences)
            loss = loss - config.entropy_coef * bonus
        if config.kl.coef:
            assert microbatch.ref_logprobs is not None, "ref_logprobs come before the first update"
            kl = kl_estimate(logprobs, microbatch.ref_logprobs, mask, config.kl)
            stats.append(kl.detach())
            if config.kl.where == "loss":
                loss = loss + config.kl.coef * self._sum(kl, sequences)
        sums = torch.stack([stat.sum().float() for stat in stats])
        return ObjectiveTerms(loss=loss, sums=sums, maxima=ratio.max().unsqueeze(0))

    def _token_loss(self, tokens: PolicyTokens) -> Tensor:
        """[T], 0 outside the mask."""
        token_loss = self.loss(tokens, self.config)
        if token_loss.shape != tokens.loss_mask.shape:
            raise ValueError(
                f"objective.loss: {self.config.loss} gave a shape {tuple(token_loss.shape)}, "
                f"expected one loss a token, {tuple(tokens.loss_mask.shape)}"
            )
        return torch.where(tokens.loss_mask, token_loss, 0.0)

    def _sum(self, values: Tensor, sequences: Sequences) -> Tensor:
        """What `normalizer` turns into the aggregate; values [T] are 0 outside the mask."""
        if self.config.aggregation == "seq_mean_token_mean":
            return sequences.mean(values).sum()
        return values.sum()


@dataclass(kw_only=True, frozen=True, slots=True)
class NextTokenObjective:
    """Cross-entropy of the response tokens: the warm start."""

    stat_names: ClassVar[tuple[str, ...]] = ()
    max_names: ClassVar[tuple[str, ...]] = ()
    temperature: float = 1.0
    with_entropy_grad: bool = False

    def normalizer(self, minibatch: Minibatch) -> int:
        return minibatch.global_valid_tokens

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        loss = torch.where(microbatch.loss_mask, -logprobs, 0.0).sum()
        nothing = logprobs.new_zeros(0)
        return ObjectiveTerms(loss=loss, sums=nothing, maxima=nothing)
