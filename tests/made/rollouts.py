"""Rollouts of which nothing but the rewards matters, alone and as the engines answer."""

from __future__ import annotations

from collections.abc import Mapping

from sfpo_megatron.data.selective import Outcome
from sfpo_megatron.rollout.reports import EngineLoad, RolloutTimes, SamplingCounts, ScoredRequest
from sfpo_megatron.types import Rollout


def group(
    name: str, rewards: list[float], finished: bool = True, *, weight_version: int = 0
) -> list[Rollout]:
    return [
        Rollout(
            prompt_id=name,
            sample=sample,
            prompt_token_ids=(1,),
            token_ids=(2,),
            generator_logprobs=(0.0,),
            response_mask=(True,),
            finished=finished,
            text="",
            reward=reward,
            correct=reward >= 1,
            weight_version=weight_version,
        )
        for sample, reward in enumerate(rewards)
    ]


def scored_request(
    rollouts: list[Rollout], *, num_groups: int = 1, outcomes: Mapping[str, Outcome] | None = None
) -> ScoredRequest:
    """What the engines answer with `rollouts`, after one round and without a restart."""
    return ScoredRequest(
        rollouts=rollouts,
        times=RolloutTimes(generate_s=1.0, reward_s=1.0),
        counts=SamplingCounts(num_rounds=1, num_groups=num_groups),
        outcomes=outcomes or {},
        load=EngineLoad(
            kv_cache_usage=0.5, num_preemptions=0, num_requests=4, queue_s=2.0, busy_s=0.75
        ),
        num_reissued=0,
        num_restarts=0,
    )
