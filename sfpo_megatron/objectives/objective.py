"""What a pass minimizes: token sums of a loss and its statistics, from log-probs and entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.objectives.checked import checked_loss, no_gradient
from sfpo_megatron.objectives.finite import finite
from sfpo_megatron.objectives.kl import kl_estimate
from sfpo_megatron.objectives.mismatch import mismatch_weights
from sfpo_megatron.objectives.sequences import Sequences
from sfpo_megatron.objectives.surrogate import (
    PolicyLoss,
    PolicyTokens,
    Statistics,
    log_ratio_of,
    outside_bounds,
    ratio_of,
)
from sfpo_megatron.plugins import LOSS
from sfpo_megatron.types import Microbatch, Minibatch

OF_EVERY_PASS = frozenset({"loss", "entropy", "grad_norm"})
"""What a pass says of itself; no statistic of an objective has such a name."""

_OF_THE_POLICY = frozenset(
    {"ratio_mean", "ratio_max", "ppo_kl", "mismatch_weight_mean", "mismatch_rejected", "ref_kl"}
)


@dataclass(kw_only=True, frozen=True, slots=True)
class ObjectiveTerms:
    """What an objective finds in one microbatch. Its statistics have the same names, in the same
    order, in every microbatch and on every rank; no name stands in both."""

    loss: Tensor  # [] sum of the token losses, differentiable
    sums: dict[str, Tensor] = field(default_factory=dict)
    """[] each: it becomes a mean over the tokens under the loss masks."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """[] each, of values >= 0."""


class Objective(Protocol):
    """Called once a microbatch, on the ranks of the last pipeline stage. Keep one object for the
    whole run: its statistics' names are agreed between the ranks when a pass first meets it."""

    @property
    def temperature(self) -> float:
        """The log-probs and entropies it is given are of logits / temperature."""

    @property
    def with_entropy_grad(self) -> bool:
        """Whether the loss needs the gradient of the entropy."""

    def normalizer(self, minibatch: Minibatch) -> int:
        """What the loss sum of all microbatches and ranks is divided by: the same on all ranks."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        """The loss and its statistics on this rank; logprobs, entropy: [T]."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PolicyObjective:
    """A policy loss (surrogate.py), and optionally an entropy bonus and a KL penalty, aggregated as
    configured."""

    config: ObjectiveConfig
    loss: PolicyLoss
    max_response_tokens: int
    """The constant of `aggregation: token_sum_norm`."""
    temperature: float
    """The temperature that the responses were sampled at."""
    first_pass_is_old: bool = False
    """If `old_logprobs` are not set yet, the log-probs of this forward become them. Only right in
    the first minibatch of the first pass, before which no weight has moved."""

    @staticmethod
    def of(config: RunConfig, *, first_pass_is_old: bool = False) -> PolicyObjective:
        """The config's objective; PluginError if `objective.loss` cannot be loaded."""
        return PolicyObjective(
            config=config.objective,
            loss=LOSS.load(config.objective.loss),
            max_response_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
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

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        if microbatch.old_logprobs is None and self.first_pass_is_old:
            microbatch.old_logprobs = logprobs.detach()
        assert microbatch.old_logprobs is not None, "old_logprobs come before the first update"
        config, mask, old = self.config, microbatch.loss_mask, microbatch.old_logprobs
        sequences = Sequences(microbatch.cu_seqlens, mask)
        log_ratio = log_ratio_of(logprobs, old, mask)
        tokens = PolicyTokens(
            logprobs=finite(logprobs),
            old_logprobs=finite(old),
            ratio=ratio_of(log_ratio, sequences, config),
            advantages=microbatch.advantages,
            loss_mask=mask,
            sequences=sequences,
        )
        ratio = torch.where(mask, tokens.ratio.detach(), 0.0)
        stats = {"ratio_mean": ratio, "ppo_kl": -log_ratio.detach()}
        token_loss, clipped = self._policy_loss(tokens)
        stats |= clipped
        if config.importance_sampling.is_on:
            weights, rejected = mismatch_weights(
                old, microbatch.generator_logprobs, mask, sequences, config.importance_sampling
            )
            token_loss = token_loss * weights
            stats["mismatch_weight_mean"] = torch.where(mask, weights, 0.0)
            stats["mismatch_rejected"] = rejected
        loss = self._sum(token_loss, sequences)
        if self.with_entropy_grad:
            bonus = self._sum(torch.where(mask, entropy, 0.0), sequences)
            loss = loss - config.entropy_coef * bonus
        if config.kl.coef:
            assert microbatch.ref_logprobs is not None, "ref_logprobs come before the first update"
            kl = kl_estimate(logprobs, microbatch.ref_logprobs, mask, config.kl)
            stats["ref_kl"] = kl.detach()
            if config.kl.where == "loss":
                loss = loss + config.kl.coef * self._sum(kl, sequences)
        if logprobs.requires_grad and not loss.requires_grad:
            raise no_gradient(config.loss)
        return ObjectiveTerms(
            loss=loss,
            sums={name: values.sum().float() for name, values in stats.items()},
            maxima={"ratio_max": ratio.max()},
        )

    def _policy_loss(self, tokens: PolicyTokens) -> tuple[Tensor, Statistics]:
        """(token losses, statistics), [T], 0 outside the mask."""
        taken = OF_EVERY_PASS | _OF_THE_POLICY
        losses, given = checked_loss(self.loss, tokens, self.config, taken)
        outside = outside_bounds(tokens, self.config)
        return losses, {n: v & tokens.loss_mask for n, v in outside.items()} | given

    def _sum(self, values: Tensor, sequences: Sequences) -> Tensor:
        """What `normalizer` turns into the aggregate; values [T] are 0 outside the mask."""
        if self.config.aggregation == "seq_mean_token_mean":
            return sequences.mean(values).sum()
        return values.sum()


@dataclass(kw_only=True, frozen=True, slots=True)
class NextTokenObjective:
    """Cross-entropy of the response tokens: the warm start."""

    temperature: float = 1.0
    with_entropy_grad: bool = False

    def normalizer(self, minibatch: Minibatch) -> int:
        return minibatch.global_valid_tokens

    def __call__(self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        loss = torch.where(microbatch.loss_mask, -logprobs, 0.0).sum()
        return ObjectiveTerms(loss=loss)
