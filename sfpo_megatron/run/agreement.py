"""Generator against trainer: whether their log-probs are as far apart as the dtype allows.

Judged are batches that the trainer's own weights have generated: of stale ones (async_steps) the
difference is the update's too, and saved ones (debug.train_only) may be any weights'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.outputs.stopping import RunEnded
from sfpo_megatron.types import Minibatch, RolloutBatch

ALLOWED = {
    "float32": (1e-3, 0.05),
    "float16": (0.02, 1.0),
    "bfloat16": (0.05, 2.0),
    "fp8_per_channel": (0.15, 4.0),
}
"""(mean, maximum) of |difference| in nats, by rollout.quantization or else model.dtype.
docs/numerics.md has what was measured: a wrong rope gives a mean of 0.14 and more."""

_WORSE = 10.0
"""A second warning comes when the mean is this many times that of the last one."""

_CAUSES = (
    "look at rope_theta and rope scaling, the norms' eps, tied embeddings, rollout.temperature, "
    "rollout.top_p, rollout.quantization, weights that a refit left stale (refit.verify_every)"
)


class GeneratorDisagrees(RunEnded):
    """The log-probs differ by more than train.max_logprob_diff; raised on every rank."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Parting:
    """The token whose two log-probs are farthest apart."""

    row: int
    """Row of its rollout in the batch."""
    position: int
    """Its place in the response, from 0."""
    generator: float
    trainer: float


@dataclass(kw_only=True, frozen=True, slots=True)
class Judgement:
    """What is to be said of a step; the same on every rank."""

    warnings: tuple[str, ...] = ()
    stop: str | None = None
    """Why the run ends."""


class Agreement:
    """Remembers what has been warned of in this run."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._warned = 0.0

    def judge(
        self,
        policy: Policy,
        step: int,
        batch: RolloutBatch,
        minibatches: Sequence[Minibatch],
        metrics: Mapping[str, float],
        prompt_ids: Sequence[str] = (),
    ) -> Judgement:
        """`metrics`: those of `logprob_difference`, the same on every rank, so that all ranks take
        the same way. `prompt_ids`: the id of each prompt of the batch, where rank 0 knows them.
        Collective where a limit is passed."""
        if self._config.debug.train_only or batch.weight_version != step - 1:
            return Judgement()
        mean, highest = metrics["logprob_diff_mean"], metrics["logprob_diff_max"]
        limit, worst = allowed(self._config)
        most = self._config.train.max_logprob_diff
        stops = most is not None and mean > most
        # nan without a trained token too, which says nothing.
        broken = math.isnan(mean) and any(m.global_valid_tokens for m in minibatches)
        size = math.inf if broken else max(limit, mean)
        stops = stops or (most is not None and broken)
        apart = broken or mean > limit or highest > worst
        again = size > self._warned and size >= _WORSE * self._warned  # at first too
        if not stops and not (apart and again):
            return Judgement()
        parting = farthest(policy, batch, minibatches)
        text = (
            f"train step {step}: generator and trainer disagree by {mean:.3g} nats a token in the "
            f"mean, {highest:.3g} at most; expected up to {limit:.3g} and {worst:.3g}"
        )
        if parting is not None:
            prompt, sample = divmod(parting.row, batch.group_size)
            known = prompt_ids[prompt] if prompt < len(prompt_ids) else None
            known = policy.control.broadcast_json(known)
            named = f", {known}" if known is not None else ""
            text += (
                f"; farthest in rollout {parting.row} (prompt {prompt} of the batch{named}, sample "
                f"{sample}) at response token {parting.position}: generator "
                f"{parting.generator:.4g}, trainer {parting.trainer:.4g}"
            )
        if stops:
            return Judgement(stop=f"{text}; train.max_logprob_diff is {most:g}: {_CAUSES}")
        self._warned = size
        return Judgement(warnings=(f"{text}: {_CAUSES}",))


def allowed(config: RunConfig) -> tuple[float, float]:
    """(mean, maximum) of |difference|. Below 1 top_p renormalizes the generator's, which adds up to
    -log(top_p) to every token."""
    mean, highest = ALLOWED[config.rollout.quantization or config.model.dtype]
    nucleus = -math.log(config.rollout.top_p)
    return mean + nucleus, highest + nucleus


def farthest(
    policy: Policy, batch: RolloutBatch, minibatches: Sequence[Minibatch]
) -> Parting | None:
    """The trained token that generator and trainer are farthest apart at; None without one.
    The same on every rank; collective."""
    mine: list[tuple[float, int, int, float, float]] = []
    for microbatch in (m for minibatch in minibatches for m in minibatch.microbatches):
        old, mask = microbatch.old_logprobs, microbatch.loss_mask
        if old is None or policy.layout.tensor_rank != 0 or not mask.any():
            continue  # log-probs live on the last stage; tensor-parallel ranks hold the same
        gap = torch.where(mask, (microbatch.generator_logprobs - old).abs(), -1.0)
        at = int(torch.where(gap.isnan(), math.inf, gap).argmax())
        ends = microbatch.cu_seqlens[1:]
        row = int(microbatch.rollouts[int((ends <= at).sum())])
        # Positions are of the whole sequence, where context-parallel ranks share it, too.
        position = int(microbatch.position_ids[at]) + 1 - int(batch.prompt_lengths[row])
        generated = float(microbatch.generator_logprobs[at])
        size = float(gap[at])
        size = math.inf if math.isnan(size) else size
        mine.append((size, row, position, generated, float(old[at])))
    found = [one for of_rank in policy.control.all_gather_json(mine) for one in of_rank]
    if not found:
        return None
    _, row, position, generated, trained = min(found, key=lambda one: (-one[0], one[1], one[2]))
    return Parting(row=row, position=position, generator=generated, trainer=trained)
