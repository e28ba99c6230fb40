"""Each file of examples/objectives/ trains the demo's task: 20 steps, 2 seeds, a rising reward.

Figures: benchmarks/results/objectives.json. Two seeds show that an objective learns here, not which
of them is better.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import digits
import pytest

from benchmarks.common import provenance
from sfpo_megatron.config.load import load_config
from sfpo_megatron.demo import CONFIG
from sfpo_megatron.demo.legs import write_data
from sfpo_megatron.demo.tiny_model import DEMO, make_tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "objectives").glob("*.yaml"))
SEEDS = (0, 1)
NUM_STEPS = 20
ENDS = 5  # steps in the mean at either end: one step's mean reward is noisy


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo up to its warm start: its data, and the policy before RL."""
    run = tmp_path_factory.mktemp("demo")
    write_data(run / "data")
    overrides = data_of(run)
    config = load_config(CONFIG, overrides)
    make_tiny_model(config, run / "model", DEMO, seed=0)
    paths = [f"output_dir={run / 'warm_start'}", f"model.path={run / 'model'}"]
    command = [sys.executable, "-m", "sfpo_megatron", "sft", str(CONFIG), *paths, *overrides]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return run


def data_of(run: Path) -> list[str]:
    return [f"data.{split}.0.path={run}/data/legs-{split}.parquet" for split in ("train", "eval")]


@pytest.mark.full
def test_every_objective_learns(tmp_path: Path, demo: Path) -> None:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for example in EXAMPLES:
        for seed in SEEDS:
            run = tmp_path / f"{example.stem}-{seed}"
            digits.train(
                example,
                f"output_dir={run}",
                f"model.path={demo / 'warm_start/hf'}",
                *data_of(demo),
                f"train.num_steps={NUM_STEPS}",
                "eval.every=0",
                f"seed={seed}",
                timeout_s=600,
            )
            train, evals = digits.read_metrics(run)
            rewards = [line["reward_mean"] for line in train]
            assert len(train) == NUM_STEPS
            figures.setdefault(example.stem, {})[f"seed {seed}"] = {
                "reward_mean_first_steps": fmean(rewards[:ENDS]),
                "reward_mean_last_steps": fmean(rewards[-ENDS:]),
                "held_out_accuracy_before": evals[0]["eval/accuracy"],
                "held_out_accuracy_after": evals[-1]["eval/accuracy"],
                "num_skipped_steps": sum(line["num_skipped_steps"] for line in train),
                "min_grad_norm": min(line["grad_norm"] for line in train),
                "max_ratio": max(line["pass_3/ratio_max"] for line in train if line["sfpo_active"]),
            }
    provenance.write_cpu("objectives", {"num_steps": NUM_STEPS, "objectives": figures})
    for objective, seeds in figures.items():
        for seed_name, found in seeds.items():
            where = (objective, seed_name, found)
            assert found["num_skipped_steps"] == 0, where
            assert found["min_grad_norm"] > 0, where
            assert found["reward_mean_last_steps"] > found["reward_mean_first_steps"], where
