"""What both trainers are given: model, prompts, batch, optimizer settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import provenance
from sfpo_megatron.config.load import load_config
from sfpo_megatron.demo.tiny_model import TinyModel, make_tiny_model

NUM_PROMPTS = 4_000


@dataclass(kw_only=True, frozen=True, slots=True)
class Task:
    """Prompts, a policy for them, and how long it answers."""

    problems: str
    """A data set of reasoning-gym."""
    args: Mapping[str, Any]
    model: TinyModel
    reward: str
    """A function of rewards.py."""
    max_prompt_tokens: int
    max_response_tokens: int
    warm_start: Mapping[str, float]
    """Section sft of the warm start; empty: the policy is random, so that each token ends the
    response with a probability of one in its vocabulary."""


SHORT = Task(
    problems="aiw",
    args={"task_type_weights": [0.5, 0.5, 0.0], "max_entities": 9},
    model=TinyModel(max_vocab=1023),
    reward="right",
    max_prompt_tokens=64,
    max_response_tokens=4,
    warm_start={"num_steps": 75, "examples_per_step": 64, "lr": 1.0e-3},
)
_LARGER = {"hidden_size": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4, "ffn": 768}
_LEGS = {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 2}
MIDDLE = Task(
    problems="leg_counting",
    args=_LEGS,
    model=TinyModel(**_LARGER, max_vocab=1023),
    reward="even_length",
    max_prompt_tokens=64,
    max_response_tokens=128,
    warm_start={},
)
RAGGED = Task(
    problems="leg_counting",
    args=_LEGS,
    model=TinyModel(**_LARGER, max_vocab=259, max_positions=1024),  # bytes, and few of them
    reward="even_length",
    max_prompt_tokens=192,
    max_response_tokens=512,
    warm_start={},
)


@dataclass(kw_only=True, frozen=True, slots=True)
class Case:
    """One comparison; both trainers make two optimizer steps a sweep over the batch."""

    name: str
    says: str
    task: Task
    prompts_per_step: int
    least_ratio: float
    """Theirs / ours, seconds a step, to reach."""
    sweeps: int = 1
    """Over each rollout batch: TRL's `num_iterations`, our K + 1."""
    lr: float = 1.0e-6
    group_size: int = 8
    minibatches: int = 2

    @property
    def num_rollouts(self) -> int:
        """Rollouts of a train step."""
        return self.prompts_per_step * self.group_size


CASES = (
    Case(name="short", says="0.4M parameters, responses of 2 tokens", task=SHORT,
         prompts_per_step=32, least_ratio=1.1, lr=2.0e-4),
    Case(name="sweeps", says="the same, four sweeps over each batch: SFPO with K = 3", task=SHORT,
         prompts_per_step=32, least_ratio=1.3, lr=2.0e-4, sweeps=4),
    Case(name="middle", says="4.9M parameters, responses of about 115 tokens", task=MIDDLE,
         prompts_per_step=8, least_ratio=1.1),
    Case(name="ragged", says="4.8M parameters, responses of 1 to 512 tokens", task=RAGGED,
         prompts_per_step=8, least_ratio=2.0),
)  # fmt: skip


@dataclass(kw_only=True, frozen=True, slots=True)
class Material:
    """A case on disk."""

    rows: Path
    """A JSON object a line: prompt, answer."""
    model: Path
    config: Path
    """The config of sfpo-megatron."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Step:
    """One train step of either trainer."""

    seconds: float
    """From the end of the one before to its own."""
    rollouts_s: float
    """Seconds until the rewards are known: generation, and in TRL the old log-probs."""
    passes_s: float
    """Seconds in forward, backward and optimizer."""
    response_tokens: float
    accuracy: float
    """Share of the batch's rollouts whose reward is 1."""


def prepare(case: Case, folder: Path) -> Material:
    """Write prompts, config and the policy that both start from."""
    import reasoning_gym

    folder.mkdir(parents=True)
    rows = folder / "rows.jsonl"
    problems = reasoning_gym.create_dataset(
        case.task.problems, size=NUM_PROMPTS, seed=0, **case.task.args
    )
    unique = {entry["question"]: entry["answer"] for entry in problems}
    rows.write_text(
        "".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in unique.items())
    )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(case, folder)))
    model = folder / "model"
    make_tiny_model(load_config(str(config)), model, case.task.model, seed=0)
    if case.task.warm_start:
        words = [str(config), f"output_dir={folder / 'warm'}", "parallel.data=1"]
        command = [sys.executable, "-m", "sfpo_megatron", "sft", *words]
        subprocess.run(command, check=True, cwd=provenance.ROOT, stdout=subprocess.DEVNULL)
        model = folder / "warm/hf"
    return Material(rows=rows, model=model, config=config)


def config_of(case: Case, folder: Path) -> dict[str, Any]:
    """Ours: two ranks, one engine on each core."""
    task = case.task
    return {
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "parallel": {"data": 2},
        "train": {
            "prompts_per_step": case.prompts_per_step,
            "group_size": case.group_size,
            "minibatches_per_step": case.minibatches,
            "optimizer": {"lr": case.lr, "weight_decay": 0.0},
        },
        "sfpo": {"num_fast_passes": case.sweeps - 1},
        "rollout": {
            "num_engines": 2,
            "max_prompt_tokens": task.max_prompt_tokens,
            "max_response_tokens": task.max_response_tokens,
        },
        "data": {"train": [{"source": "jsonl", "path": str(folder / "rows.jsonl")}]},
        "reward": {"function": f"benchmarks.versus.rewards:{task.reward}"},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "sft": dict(task.warm_start),
    }
