"""What runs in TRL's venv: GRPOTrainer on a case, and how long its train steps took.

Started by theirs.py under torchrun, once a process; settings come as JSON. Each rank writes
rank-N.json: a train step (all optimizer steps on one generated batch) an object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.versus import rewards
from sfpo_megatron.rewards import Problem
from sfpo_megatron.types import Prompt


class Watch(TrainerCallback):
    """Notes when a batch is begun, rewarded and used up."""

    def __init__(self, score: Callable[[str, Problem], float], steps_per_batch: int) -> None:
        self._score = score
        self._steps_per_batch = steps_per_batch
        self._last_s = self._begun_s = time.perf_counter()
        self._batch: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def reward(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        prompts: list[str],
        answer: list[str],
        **others: Any,
    ) -> list[float]:
        """What GRPOTrainer calls once for each batch that it has generated."""
        problems = [
            Prompt(id="", text=question, token_ids=(), question=question, answer=reference)
            for question, reference in zip(prompts, answer, strict=True)
        ]
        found = [self._score(c, p) for c, p in zip(completions, problems, strict=True)]
        self._batch = {
            "rollouts_s": time.perf_counter() - self._begun_s,
            "response_tokens": fmean(map(len, completion_ids)),
            "accuracy": fmean(one == 1 for one in found),
        }
        return found

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % self._steps_per_batch == 0:
            self._begun_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % self._steps_per_batch == 0:
            now_s = time.perf_counter()
            self.steps.append({"seconds": now_s - self._last_s, **self._batch})
            self._last_s = now_s


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    steps_per_batch = given["minibatches"] * given["sweeps"]
    config = GRPOConfig(
        output_dir=given["out"],
        use_cpu=True,
        ddp_backend="gloo" if num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=given["num_steps"] * steps_per_batch,
        per_device_train_batch_size=given["num_rollouts"] // given["minibatches"] // num_processes,
        gradient_accumulation_steps=1,
        steps_per_generation=given["minibatches"],
        num_iterations=given["sweeps"],
        num_generations=given["group_size"],
        max_completion_length=given["max_response_tokens"],
        learning_rate=given["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=given["seed"],
    )
    rows = [json.loads(line) for line in Path(given["rows"]).read_text().splitlines()]
    watch = Watch(getattr(rewards, given["reward"]), steps_per_batch)
    trainer = GRPOTrainer(
        model=given["model"],
        reward_funcs=watch.reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        callbacks=[watch],
    )
    trainer.train()
    Path(given["out"], f"rank-{rank}.json").write_text(json.dumps(watch.steps))


if __name__ == "__main__":
    main()
