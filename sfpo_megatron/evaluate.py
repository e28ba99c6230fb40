"""Held-out accuracy of the policy that the engines hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from sfpo_megatron.rollout.client import RolloutClient


def evaluate(
    config: RunConfig, client: RolloutClient, prompts: Sequence[Prompt], *, step: int
) -> dict[str, float]:
    """avg@n over `prompts` at `eval.temperature`, and of each source of data.eval where there are
    several; metrics under `eval/`. Rank 0 only."""
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
    rollouts = client.collect(request.id)
    num = len(rollouts)
    sources: dict[str, list[float]] = {}
    for rollout in rollouts:  # ids are `eval.SOURCE/NUMBER`
        name = rollout.prompt_id.rpartition("/")[0].removeprefix("eval.")
        sources.setdefault(name, []).append(float(rollout.correct))
    of_each = {f"eval/accuracy/{name}": sum(v) / len(v) for name, v in sources.items()}
    return {
        "step": step,
        "eval/accuracy": sum(r.correct for r in rollouts) / num,
        "eval/reward_mean": sum(r.reward for r in rollouts) / num,
        "eval/response_tokens_mean": sum(len(r.token_ids) for r in rollouts) / num,
        "eval/num_rollouts": num,
        **(of_each if len(of_each) > 1 else {}),
    }
