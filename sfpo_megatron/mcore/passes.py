"""One pass: for each minibatch zero_grad -> Megatron's forward-backward -> optimizer.step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sfpo_megatron.host.progress import counted
from sfpo_megatron.host.spans import span
from sfpo_megatron.mcore.device_choices import seqlen_bound
from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs
from sfpo_megatron.mcore.model import unwrapped
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.mcore.statistics import Found, Totals, add_up, found_in
from sfpo_megatron.objectives.objective import Objective
from sfpo_megatron.types import Microbatch, Minibatch

Head = TypeVar("Head")


@dataclass(kw_only=True, frozen=True, slots=True)
class MinibatchResult:
    """One optimizer step, as every rank sees it; means are over the minibatch's valid tokens."""

    loss: float
    """The loss, normalized by the objective."""
    entropy: float
    """Exact policy entropy (nats) before the step."""
    grad_norm: float
    """Norm before clipping; nan for a skipped step."""
    stats: dict[str, float]
    """Means of the objective's statistics, by name."""
    maxima: dict[str, float]
    """Its maxima, by name."""
    num_tokens: int
    skipped: bool
    """Megatron found a non-finite gradient and left the weights as they were."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PassResult:
    """One sweep over all minibatches."""

    minibatches: tuple[MinibatchResult, ...]

    def mean(self, value: Callable[[MinibatchResult], float]) -> float:
        """Token-weighted mean over the minibatches; nan if every rollout is masked out."""
        if self.num_tokens == 0:
            return math.nan
        return math.fsum(value(m) * m.num_tokens for m in self.minibatches) / self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens under the loss masks, over all data-parallel ranks."""
        return sum(m.num_tokens for m in self.minibatches)

    def mean_of(self, stat: str) -> float:
        """`mean` of one of the objective's statistics."""
        return self.mean(lambda m: m.stats[stat])

    @property
    def means(self) -> dict[str, float]:
        """`mean_of` each of the objective's statistics."""
        return {stat: self.mean_of(stat) for stat in self.minibatches[0].stats}

    @property
    def maxima(self) -> dict[str, float]:
        """The objective's maxima, over all minibatches."""
        names = self.minibatches[0].maxima
        return {name: max(m.maxima[name] for m in self.minibatches) for name in names}

    @property
    def grad_norm(self) -> float:
        """Mean over the optimizer steps that were not skipped; nan if all were."""
        norms = [m.grad_norm for m in self.minibatches if math.isfinite(m.grad_norm)]
        return sum(norms) / len(norms) if norms else math.nan

    @property
    def num_skipped(self) -> int:
        return sum(m.skipped for m in self.minibatches)


def run_pass(policy: Policy, minibatches: Sequence[Minibatch], objective: Objective) -> PassResult:
    """One optimizer step per minibatch, in order. Every rank calls it; collective throughout.

    Returns the same result on every rank: sums come from the last pipeline stage's first
    tensor-parallel ranks, added up over data-parallel ranks in one reduction at the end (and maxima
    in another). `objective` is the same object in every pass.
    """
    totals, norms, skipped, results = [], [], [], []
    for minibatch in counted("minibatches", minibatches):
        policy.shards.ready_for_training()
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
        policy.optimizer.zero_grad()
        with span("forward_backward"):
            totals.append(_forward_backward(policy, minibatch, objective))
        with span("optimizer_step"), policy.shards.gathers_deferred():
            successful, grad_norm, _ = policy.optimizer.step()
        norms.append(float("nan") if grad_norm is None else float(grad_norm))
        skipped.append(not successful)
    reduced = policy.statistics.reduce(objective, totals)
    for minibatch, found, norm, skip in zip(minibatches, reduced, norms, skipped, strict=True):
        num_tokens = max(1, minibatch.global_valid_tokens)
        results.append(
            MinibatchResult(
                loss=found.loss / max(1, objective.normalizer(minibatch)),
                entropy=found.entropy / num_tokens,
                grad_norm=norm,
                stats={name: value / num_tokens for name, value in found.sums.items()},
                maxima=found.maxima,
                num_tokens=minibatch.global_valid_tokens,
                skipped=skip,
            )
        )
    return PassResult(minibatches=tuple(results))


@torch.no_grad()
def compute_logprobs(
    policy: Policy, minibatches: Sequence[Minibatch], *, temperature: float
) -> list[list[Tensor]]:
    """Log-probs under the current weights, of logits / `temperature`: [T] for each microbatch of
    each minibatch, on the ranks of the last pipeline stage (empty lists elsewhere). Collective;
    same packs as the passes, so the first pass's ratios are exactly 1."""
    policy.shards.params_ready()
    head = partial(_logprobs_only, temperature=temperature)
    return [
        _schedule(policy, minibatch, head, forward_only=True)
        for minibatch in counted("minibatches", minibatches)
    ]


def on_device(policy: Policy, minibatches: Sequence[Minibatch]) -> list[Minibatch]:
    """The same minibatches on the device of this rank's model: moved once, used by all passes."""
    device = next(policy.chunks[0].parameters()).device
    return [
        replace(minibatch, microbatches=tuple(_to(m, device) for m in minibatch.microbatches))
        for minibatch in minibatches
    ]


def _to(microbatch: Microbatch, device: torch.device) -> Microbatch:
    values = {name: getattr(microbatch, name) for name in microbatch.__slots__}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return replace(microbatch, **{name: t.to(device) for name, t in tensors.items()})


def set_old_logprobs(minibatches: Sequence[Minibatch], old_logprobs: list[list[Tensor]]) -> None:
    """Fix `old_logprobs` of every microbatch, once, before the first update."""
    for minibatch, values in zip(minibatches, old_logprobs, strict=True):
        for microbatch, value in zip(minibatch.microbatches, values, strict=False):
            microbatch.old_logprobs = value


def take_generator_logprobs(minibatches: Sequence[Minibatch]) -> None:
    """Fix `old_logprobs` to the log-probs that the tokens were sampled with."""
    for microbatch in (m for minibatch in minibatches for m in minibatch.microbatches):
        microbatch.old_logprobs = microbatch.generator_logprobs


def _forward_backward(policy: Policy, minibatch: Minibatch, objective: Objective) -> Totals:
    """Gradients of one minibatch; returns what this rank found."""
    # Megatron divides the loss by the number of microbatches and DDP averages over data-parallel
    # ranks; both are undone so that the loss is sum / normalizer whatever the split. With
    # calculate_per_token_loss neither happens: finalize_model_grads divides by the sum of the token
    # counts that we return, which is global_valid_tokens.
    normalizer = max(1, objective.normalizer(minibatch))  # 0: every rollout is masked out
    per_token = unwrapped(policy.chunks[0]).config.calculate_per_token_loss
    undone = len(minibatch.microbatches) * policy.layout.data_size
    divisor = max(1, minibatch.global_valid_tokens) if per_token else undone
    scale = divisor / normalizer
    if policy.aux_losses is not None:
        scale /= policy.aux_losses.weigh(minibatch, divisor)

    def loss_of(logits: Tensor, microbatch: Microbatch) -> tuple[Tensor | Found, ...]:
        logprobs, entropy = _logprobs(
            policy,
            logits,
            microbatch,
            temperature=objective.temperature,
            with_entropy_grad=objective.with_entropy_grad,
        )
        terms = objective(logprobs, entropy, microbatch)
        entropy_sum = torch.where(microbatch.loss_mask, entropy.detach(), 0.0).sum()
        found = found_in(terms, entropy_sum)
        if per_token:
            return terms.loss * scale, microbatch.loss_mask.sum(dtype=torch.int), found
        return terms.loss * scale, found

    found = _schedule(policy, minibatch, loss_of, forward_only=False)
    return add_up(found, counts=policy.layout.tensor_rank == 0)  # the others hold the same


def _schedule(
    policy: Policy, minibatch: Minibatch, head: Callable[..., Head], *, forward_only: bool
) -> list[Any]:
    """Run Megatron's schedule (plain, 1F1B or interleaved) over one minibatch; what `head` gave."""
    context_size = policy.layout.context_size

    def loss_func(
        microbatch: Microbatch, output: Tensor, non_loss_data: bool = False
    ) -> Head:  # Megatron calls this on the last stage only
        logits = output.squeeze(0)  # [1, T, V/TP]
        return head(policy, logits, microbatch) if non_loss_data else head(logits, microbatch)

    def forward_step(
        iterator: Iterator[Microbatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Head]]:
        microbatch = next(iterator)
        cu_seqlens = microbatch.cu_seqlens * context_size
        num_tokens = microbatch.token_ids.numel() * context_size
        longest = seqlen_bound(microbatch.max_seqlen, num_tokens, policy.capabilities)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        # Float16Module would copy the logits to fp32; the log-prob kernel does so chunk by chunk.
        extra: dict[str, bool | Tensor] = {}
        if policy.dtype != "float32":
            extra["fp32_output"] = False
        if policy.aux_losses is not None and not forward_only:
            extra["padding_mask"] = policy.aux_losses.padding_mask(
                microbatch, pre_process=unwrapped(model).pre_process
            )
        output = model(
            microbatch.token_ids[None],
            microbatch.position_ids[None],
            None,
            packed_seq_params=packed,
            **extra,
        )
        return output, partial(loss_func, microbatch)

    count = len(minibatch.microbatches)
    iterators = [iter(minibatch.microbatches) for _ in policy.chunks]
    virtual = len(policy.chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual else iterators[0],
        model=policy.chunks if virtual else policy.chunks[0],
        num_microbatches=count,
        seq_length=max(m.token_ids.numel() for m in minibatch.microbatches) * context_size,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _logprobs(
    policy: Policy,
    logits: Tensor,
    microbatch: Microbatch,
    *,
    temperature: float,
    with_entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    return vocab_parallel_logprobs(
        logits,
        microbatch.labels,
        vocab_size=policy.shape.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
        temperature=temperature,
        chunk_tokens=policy.logprob_chunk_tokens,
        with_entropy_grad=with_entropy_grad,
        reuse_logits=True,  # nothing reads them later: the output layer saves its input only
    )


def _logprobs_only(
    policy: Policy, logits: Tensor, microbatch: Microbatch, *, temperature: float
) -> Tensor:
    return _logprobs(policy, logits, microbatch, temperature=temperature, with_entropy_grad=False)[
        0
    ]
