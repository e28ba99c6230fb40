"""RUNs as a run leaves them, with curves that look like training; no model has made them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

ROLLOUTS = 256
"""Rollouts of a train step."""


def write_report_run(
    directory: Path,
    *,
    seed: int = 0,
    num_fast_passes: int = 3,
    num_steps: int = 400,
    steps_done: int | None = None,
    gate_closes: int | None = 200,
    ceiling: float = 0.9,
    pace: float = 60.0,
    samples: int = 0,
    **settings: dict[str, Any],
) -> Path:
    """Write a RUN whose accuracy nears `ceiling` in `pace` steps. `settings`: sections of the
    config that are added. `samples`: steps with sample rollouts."""
    rng = random.Random(f"{seed} {num_fast_passes}")
    directory.mkdir(parents=True, exist_ok=True)
    done = num_steps if steps_done is None else steps_done
    config = {
        "seed": seed,
        "output_dir": str(directory),
        "model": {"path": f"warm_start-{seed}/hf"},
        "train": {"num_steps": num_steps, "optimizer": {"lr": 1e-6}},
        "sfpo": {
            "num_fast_passes": num_fast_passes,
            "alpha": 0.8,
            "entropy_window": 30,
            "entropy_zscore_threshold": 1.0,
        },
        "objective": {"advantage": "grpo", "loss": "ppo_clip"},
        **settings,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run_id = f"{seed:04x}{num_fast_passes:08x}"
    record = {"run_id": run_id, "started": "2026-11-29T05:00:00Z", "format": 2, "kind": "train"}
    (directory / "run.json").write_text(json.dumps(record))
    start = {
        "run_id": run_id, "after_step": 0, "started": "2026-11-29T05:00:00Z", "host": "node-1",
        "hardware": "8 x NVIDIA H100 80GB HBM3; 192 cores of a CPU, 2048 GiB",
        "sfpo-megatron": "0.1.0", "commit": "2e0c97f" + "0" * 33, "python": "3.12.4",
        "torch": "2.13.0", "vllm": "0.32.0",
    }  # fmt: skip
    (directory / "environment.jsonl").write_text(json.dumps(start) + "\n")
    accuracy = 0.25
    lines: list[dict[str, Any]] = [{"step": 0, **_evaluation(accuracy)}]
    for step in range(1, done + 1):
        accuracy = 0.25 + (ceiling - 0.25) * (1 - math.exp(-step / pace))
        is_open = num_fast_passes > 0 and (gate_closes is None or step < gate_closes)
        lines.append(_train_step(rng, step, accuracy, num_fast_passes if is_open else 0))
        if step % 10 == 0:
            lines.append({"step": step, **_evaluation(accuracy + rng.gauss(0, 0.01))})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    chosen = [round(i * done / samples) for i in range(1, samples + 1)]
    told = "".join(json.dumps(_sample(rng, step)) + "\n" for step in chosen for _ in range(2))
    if told:
        (directory / "samples.jsonl").write_text(told)
    return directory


def _evaluation(accuracy: float) -> dict[str, float]:
    return {
        "eval/accuracy": accuracy,
        "eval/reward_mean": accuracy,
        "eval/response_tokens_mean": 42.5,
        "eval/truncated": 0.01,
        "eval/num_rollouts": 512,
    }


def _train_step(rng: random.Random, step: int, accuracy: float, k: int) -> dict[str, Any]:
    length = 300 + step / 2 + rng.gauss(0, 8)
    drift = 0.004 * math.exp(-step / 300)
    passes = {
        f"pass_{i}/ppo_kl": drift * (i - 0.5) * rng.uniform(0.9, 1.1) for i in range(1, k + 1)
    }
    slow = drift * (0.8 * k + 0.1) * rng.uniform(0.9, 1.1)
    passes[f"pass_{k + 1}/ppo_kl"] = slow
    reward = min(1.0, max(0.0, accuracy + rng.gauss(0, 0.03)))
    seconds = {
        "generate": 21 + rng.random(), "reward": 0.4, "logprob": 4 + rng.random() / 4,
        "passes": (k + 1) * 9 + rng.random(), "reposition": 0.2 if k else 0.0, "refit": 0.9,
        "wait": 0.0,
    }  # fmt: skip
    return {
        "step": step,
        "num_rollouts": step * ROLLOUTS,
        "reward_mean": reward,
        "accuracy": reward,
        "zero_variance_groups": 0.2 + 0.3 * accuracy,
        "truncated": 0.02 + 0.01 * rng.random(),
        "response_tokens_mean": length,
        "response_tokens_p10": 0.4 * length,
        "response_tokens_p50": 0.9 * length,
        "response_tokens_p90": 1.8 * length,
        "response_tokens_max": 2.4 * length,
        **{f"reward_{end}": float(end not in ("p10",)) for end in ("p10", "p50", "p90", "max")},
        "solved_by_all": 0.3 * accuracy,
        "solved_by_none": 0.3 * (1 - accuracy),
        "speed/generation_tokens_per_s": 256 * length / 21,
        "speed/training_tokens_per_s": 256 * length * (k + 1) / (9 * k + 9),
        "speed/tokens_per_s": 256 * length / (30 + 9 * k),
        "engines/busy": 0.8,
        "engines/queue_s": 0.05,
        "kv_cache_usage_max": 0.4,
        "loss": rng.gauss(0, 0.01),
        "entropy": 0.9 * math.exp(-step / 150) + 0.1 + rng.gauss(0, 0.004),
        "grad_norm": 0.2 + 0.1 * rng.random(),
        "logprob_diff_mean": 0.004 + 0.001 * rng.random(),
        "clip_frac": 0.02 + 0.01 * rng.random(),
        "ppo_kl": slow,
        **passes,
        "num_passes": k + 1,
        "num_optimizer_steps": step * 8,
        "num_skipped_steps": 0,
        "sfpo_active": k > 0,
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/step_s": sum(seconds.values()) + 0.5,
    }


def _sample(rng: random.Random, step: int) -> dict[str, Any]:
    responses = []
    for index in range(4):
        right = rng.random() < 0.5
        answer = "12" if right else str(rng.randint(2, 30))
        responses.append(
            {
                "text": f"Alice gives 5 of 17 apples away.\n17 - 5 = {answer}\n\\boxed{{{answer}}}",
                "reward": float(right),
                "answer": answer,
                "num_tokens": 40 + index,
                "finished": True,
            }
        )
    prompt = f"[{step}] Alice has 17 apples and gives 5 to Bob. How many apples does Alice have?"
    return {"step": step, "prompt": prompt, "reference": "12", "responses": responses}
