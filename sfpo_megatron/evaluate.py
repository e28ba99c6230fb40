"""Held-out accuracy of the policy that the engines hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import eval_prompts
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from sfpo_megatron.rollout.client import RolloutClient


def evaluate(
    config: RunConfig,
    client: RolloutClient,
    prompts: Sequence[Prompt],
    *,
    step: int,
    refit: Callable[[], None] | None = None,
) -> dict[str, float]:
    """avg@n over `prompts` at `eval.temperature`, and of each source of data.eval where there are
    several; metrics under `eval/`. Rank 0 only.

    `refit` sends the current weights to engines that were started anew; None where they are the
    model's own files.
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


def run(config: RunConfig) -> None:
    """`sfpo-megatron eval`: engines on `model.path`, no trainer; one more line of
    output_dir/eval.jsonl."""
    from transformers import AutoTokenizer

    from sfpo_megatron.rollout.controller import start_rollouts

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = eval_prompts(config, tokenizer)
    client = start_rollouts(config, model_path=config.model.path)
    try:
        client.wait_ready(config.rollout.timeout_s)
        metrics = evaluate(config, client, prompts, step=0)
    finally:
        client.close()
    del metrics["step"]
    line = json.dumps({"model": config.model.path, **metrics})
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "eval.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
    print(line, flush=True)
