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

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "objectives").glob("*.yaml"))
SEEDS = (0, 1)
NUM_STEPS = 20
ENDS = 5  # steps in the mean at either end: one step's mean reward is noisy


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's policy before RL, as `make demo` makes it."""
    run = tmp_path_factory.mktemp("warm_start")
    demo = str(ROOT / "examples" / "demo" / "config.yaml")
    model = str(run / "model")
    maker = str(ROOT / "tools" / "make_tiny_model.py")
    for command in (
        [maker, "--out", model, "--config", demo, "--seed", "0"],
        ["-m", "sfpo_megatron", "sft", demo, f"output_dir={run}", f"model.path={model}"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=600)
    return run / "hf"


@pytest.mark.full
def test_every_objective_learns(tmp_path: Path, warm_start: Path) -> None:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for example in EXAMPLES:
        for seed in SEEDS:
            run = tmp_path / f"{example.stem}-{seed}"
            digits.train(
                example,
                f"output_dir={run}",
                f"model.path={warm_start}",
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
