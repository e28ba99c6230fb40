"""Rollouts of which nothing but the rewards matters."""

from __future__ import annotations

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
