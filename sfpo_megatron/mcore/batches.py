"""A rollout batch on its way to this rank: how its part is cut, and the cut itself."""

from __future__ import annotations

import math

from torch import Tensor

from sfpo_megatron.batching import BatchLayout, build_minibatches, pad_multiple_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.device_choices import pack_multiple
from sfpo_megatron.mcore.passes import on_device
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.objectives.advantage import advantages_of, in_loss, shaped_rewards
from sfpo_megatron.types import Minibatch, RolloutBatch


def advantages(config: RunConfig, batch: RolloutBatch, kl: Tensor | None = None) -> Tensor:
    """[N], made of the rewards as the objective shapes them; `kl`: [N], one for each rollout."""
    limit = config.rollout.max_response_tokens
    rewards = shaped_rewards(batch, limit, config.objective, kl)
    return advantages_of(rewards, batch.group_size, config.objective)


def cut(config: RunConfig, policy: Policy, batch: RolloutBatch) -> list[Minibatch]:
    """This rank's minibatches, where its model is."""
    layout = batch_layout(config, policy, config.train.minibatches_per_step)
    chosen = in_loss(batch, config.objective)
    minibatches = build_minibatches(batch, advantages(config, batch), layout, in_loss=chosen)
    return on_device(policy, minibatches)


def batch_layout(config: RunConfig, policy: Policy, num_minibatches: int) -> BatchLayout:
    """How this rank's part of a batch is cut."""
    parallel, layout = config.parallel, policy.layout
    return BatchLayout(
        minibatches=num_minibatches,
        data_rank=layout.data_rank,
        data_size=layout.data_size,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
        max_tokens=config.train.max_tokens_per_microbatch,
        microbatch_size=config.train.microbatch_size,
        pad_multiple=math.lcm(pad_multiple_of(config), pack_multiple(policy.capabilities)),
        microbatch_multiple=_group_of_microbatches(config) if parallel.virtual_pipeline else 1,
        equal_lengths=parallel.pipeline > 1,
        attention_break_even=policy.shape.attention_break_even,
    )


def _group_of_microbatches(config: RunConfig) -> int:
    """Microbatches that the interleaved schedule takes together: it refuses fewer, and a remainder
    of fewer than there are stages (schedules.py)."""
    given = config.megatron.transformer.get("microbatch_group_size_per_vp_stage")
    return int(given or config.parallel.pipeline)
