"""`sfpo-megatron eval`: held-out accuracy of a model, by engines alone."""

from __future__ import annotations

import json

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import eval_prompts
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.evaluation import evaluate


def run(config: RunConfig) -> None:
    """Evaluate `model.path`, without a trainer, and add a line to RUN/eval.jsonl."""
    from sfpo_megatron.rollout.controller import start_rollouts

    tokenizer = load_tokenizer(config.model.path)
    prompts = eval_prompts(config, tokenizer)
    client = start_rollouts(config, model_path=config.model.path)
    try:
        client.wait_ready(config.rollout.timeout_s)
        metrics = evaluate(config, client, prompts, step=0)
    finally:
        client.close()
    del metrics["step"]
    line = json.dumps({"model": config.model.path, **metrics})
    evals = RunDirectory.of(config.output_dir).evals
    evals.parent.mkdir(parents=True, exist_ok=True)
    with evals.open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
    print(line, flush=True)
