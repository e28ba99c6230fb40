"""Held-out accuracy of the policy that the engines hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from sfpo_megatron.rollout.client import RolloutClient


def evaluate(
    config: RunConfig,
    client: RolloutClient,
    prompts: Sequence[Prompt],
    *,
    step: int,
    refit: Callable[[], None],
) -> dict[str, float]:
    """avg@n over `prompts` at `eval.temperature`; metrics under `eval/`. Rank 0 only.

    `refit` sends the current weights to engines that were started anew.
    """
    from sfpo_megatron.rollout.sampling import RolloutRequest

    request = RolloutRequest(
        id=f"eval/{step}",
        step=step,
        prompts=tuple(prompts),
        num_samples=config.eval.n,
        temperature=config.eval.temperature,
        top_p=1.0,
        max_response_tokens=config.rollout.max_response_tokens,
    )
    client.submit(request)
    rollouts = client.collect(request.id, refit)
    num = len(rollouts)
    return {
        "step": step,
        "eval/accuracy": sum(r.correct for r in rollouts) / num,
        "eval/reward_mean": sum(r.reward for r in rollouts) / num,
        "eval/response_tokens_mean": sum(len(r.token_ids) for r in rollouts) / num,
        "eval/num_rollouts": num,
    }
