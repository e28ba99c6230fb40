"""`sfpo-megatron demo`, `make demo-smollm2` as a user runs them; figures: benchmarks/results/."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import digits
import pytest

from benchmarks.common import provenance
from sfpo_megatron.config.load import load_config
from sfpo_megatron.demo.rollouts import sample

ROOT = Path(__file__).parents[2]
MIN_GAIN = 0.3
MAX_DEMO_S = 900


def demo(*arguments: str, timeout_s: float) -> str:
    """What `sfpo-megatron demo ARGUMENTS` prints, which `make demo` calls."""
    command = [sys.executable, "-m", "sfpo_megatron", "demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def make(*arguments: str, timeout_s: float) -> float:
    """Seconds of `make ARGUMENTS`."""
    begun = time.monotonic()
    subprocess.run(["make", *arguments], cwd=ROOT, check=True, timeout=timeout_s)
    return time.monotonic() - begun


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    """Every stage, cut short: what is printed, in which order, and what is made."""
    run = tmp_path / "demo"
    short = ["sft.num_steps=2", "train.num_steps=1", "data.eval.0.size=8"]
    printed = demo("--run", str(run), *short, timeout_s=300)
    stages = ("legs-eval: 572 rows", f"{run}/model: qwen2", "$ sfpo-megatron sft ", "step 2/2")
    stages += (f"2 rollouts of {run}/warm_start/hf:", "reward     ", "$ sfpo-megatron train ")
    stages += ("step 1: held-out accuracy 0.", f"2 rollouts of {run}/hf:", "reward     ")
    at = 0
    for stage in stages:
        assert stage in printed[at:], (stage, printed)
        at = printed.index(stage, at) + len(stage)
    assert {"data", "model", "warm_start", "hf", "plot.png"} <= {f.name for f in run.iterdir()}


@pytest.mark.full
def test_demo_with_three_seeds(tmp_path: Path) -> None:
    figures = {}
    for seed in (0, 1, 2):
        run = tmp_path / f"demo-{seed}"
        begun = time.monotonic()
        demo("--run", str(run), "--seed", str(seed), timeout_s=1200)
        seconds = time.monotonic() - begun
        train, evals = digits.read_metrics(run)
        check_every_step(train)
        first, last = evals[0]["eval/accuracy"], evals[-1]["eval/accuracy"]
        assert evals[0]["step"] == 0 and evals[0]["eval/num_rollouts"] >= 512
        assert last - first >= MIN_GAIN, (seed, first, last)
        assert seconds < MAX_DEMO_S
        figures[f"seed {seed}"] = {
            "held_out_accuracy": {line["step"]: line["eval/accuracy"] for line in evals},
            "exported_accuracy_in_transformers": accuracy_of_export(run, last),
            "gate_closed_at_step": next(
                (line["step"] for line in train if not line["sfpo_active"]), None
            ),
            "max_logprob_diff_mean": max(line["logprob_diff_mean"] for line in train),
            "max_abs_ppo_kl_first_pass": max(abs(line["ppo_kl_first_pass"]) for line in train),
            "mean_step_s": sum(line["time/step_s"] for line in train) / len(train),
            "seconds": round(seconds, 1),
        }
    provenance.write_cpu("demo", figures)


def check_every_step(train: list[dict[str, Any]]) -> None:
    """What must hold in every line of the demo's metrics."""
    steps = 0
    for number, line in enumerate(train, start=1):
        assert line["num_passes"] == (4 if line["sfpo_active"] else 1)
        steps += 2 * line["num_passes"]
        assert line["num_optimizer_steps"] == steps
        assert line["num_skipped_steps"] == 0
        assert line["grad_norm"] > 0
        assert line["weight_version"] == number
        assert abs(line["ppo_kl_first_pass"]) < 1e-6
        assert line["logprob_diff_mean"] < 1e-4
    assert train[0]["num_passes"] == 4


def accuracy_of_export(run: Path, expected: float) -> float:
    """Sampled accuracy of RUN/hf in transformers, within sampling error of the table's."""
    sampled = sample(run / "hf", load_config(str(run / "config.yaml"), []))
    num = len(sampled)
    found = sum(one.reward >= 1 for one in sampled) / num
    # Two samples of n answers each: three standard deviations of their difference.
    bound = 3 * math.sqrt(2 * expected * (1 - expected) / num) + 1 / num
    assert abs(found - expected) <= bound, (found, expected, bound)
    return found


@pytest.mark.full
def test_demo_smollm2(tmp_path: Path) -> None:
    """Two SFPO steps on the real SmolLM2-135M at PP=2."""
    run = tmp_path / "smollm2"
    seconds = make("demo-smollm2", f"RUN={run}", timeout_s=1500)
    train, evals = digits.read_metrics(run)
    assert [line["step"] for line in train] == [1, 2]
    for line in train:
        assert line["num_passes"] == 4 and line["num_skipped_steps"] == 0
        assert abs(line["ppo_kl_first_pass"]) < 1e-6
    provenance.write_cpu(
        "smollm2",
        {
            "seconds_with_download": round(seconds, 1),
            "step_s": [line["time/step_s"] for line in train],
            "logprob_diff_mean": [line["logprob_diff_mean"] for line in train],
            "held_out_accuracy": {line["step"]: line["eval/accuracy"] for line in evals},
        },
    )


def smollm2(folder: Path) -> Path:
    """The model, downloaded and converted."""
    get = [sys.executable, str(ROOT / "tools" / "get_smollm2.py"), "--out", str(folder)]
    subprocess.run(get, check=True, timeout=900)
    return folder


@pytest.mark.full
def test_smollm2_on_gsm_symbolic(tmp_path: Path) -> None:
    """The command of docs/evaluation.md, whose table is this one's: a tiny model with its chat
    template, which solves almost nothing."""
    options = ["--data", "gsm_symbolic", "--n", "4", "--max-tokens", "256", "data.eval.0.size=24"]
    command = [sys.executable, "-m", "sfpo_megatron", "eval", "--model", "smollm2", *options]
    smollm2(tmp_path / "smollm2")
    begun = time.monotonic()
    subprocess.run([*command, "--out", "out"], cwd=tmp_path, check=True, timeout=1800)
    seconds = time.monotonic() - begun
    evaluated = tmp_path / "out/eval"
    (found,) = json.loads((evaluated / "results.json").read_text())["models"].values()
    figures = found["gsm_symbolic"]
    assert (figures["num_problems"], figures["n"]) == (24, 4)
    pass_at = [figures["pass_at"][str(k)] for k in (1, 2, 3, 4)]
    assert pass_at == sorted(pass_at) and figures["accuracy"] == pytest.approx(pass_at[0])
    (file,) = evaluated.glob("*/records.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 96 and all(1 <= one["num_tokens"] <= 256 for one in records)
    # It answers as an assistant does, and ends its turn: the template's tokens are its own.
    assert figures["truncated"] < 1 and not any("<|im_" in one["text"] for one in records)
    words = " ".join(["sfpo-megatron", *command[3:]])
    content = {"command": words, "seconds": round(seconds, 1), "gsm_symbolic": figures}
    provenance.write_cpu("smollm2_gsm_symbolic", content)


@pytest.mark.full
def test_smollm2_logits_equal_transformers(tmp_path: Path) -> None:
    """The real weights at PP=2, packed, against transformers in fp32: 1e-4 of the largest logit."""
    model = smollm2(tmp_path / "model")
    out = tmp_path / "logits.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(Path(__file__).parent / "logit_ranks.py")),
            *(str(model), str(out)),
        ],
        check=True,
        timeout=600,
    )
    figures = json.loads(out.read_text())
    assert figures["worst_relative_difference"] < 1e-4, figures
    provenance.write_cpu("smollm2_logits", figures)
