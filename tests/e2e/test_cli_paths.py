"""Paths as users write them: `~`, variables, blanks, letters beyond ASCII, a dollar.

One run from the first command to an exported policy. Not exercised: Slurm, whose sbatch takes
plain characters only (tests/unit/test_slurm_render.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import digits
import pytest
from made.waiting import wait_for

from sfpo_megatron.outputs.stopping import STOPPED_EXIT_CODE

TOOLS = Path(__file__).parents[2] / "tools"
NUM_STEPS = 20


def steps_logged(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_stop_resume_evaluate_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything lies under $HOME, and nothing in the working directory. Saved rollouts: engines
    start for the evaluation alone."""
    home, cwd = tmp_path / "höme dir", tmp_path / "work"
    data, models = home / "daten übung", home / "modèles"
    for folder in (cwd, data, models):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MODELS", str(models))
    digits.make_model(models / "mein modell")
    digits.save_rollouts(home / "rollouts é.safetensors", num_steps=NUM_STEPS)
    config = digits.write_config(data, Path("$MODELS/mein modell"), train={"num_steps": NUM_STEPS})
    monkeypatch.chdir(cwd)
    paths = ["output_dir=~/läufe/ein lauf $$1", "data.train.0.path=~/daten übung/sums.jsonl"]
    paths.append("data.eval.0.path=${HOME}/daten übung/held_out.jsonl")
    more = ["debug.train_only=~/rollouts é.safetensors", "parallel.tensor=1"]
    more += ["train.prompts_per_step=8", "train.group_size=4", "checkpoint.every=100"]
    out = home / "läufe/ein lauf $1"

    process = digits.start_train(config, *paths, *more)
    try:
        wait_for(
            lambda: process.poll() is not None or steps_logged(out) >= 2,
            timeout_s=100,
            what="steps",
        )
        process.send_signal(signal.SIGTERM)
        stopped, _ = process.communicate(timeout=60)
    finally:
        digits.end(process)
    assert process.returncode == STOPPED_EXIT_CODE, stopped
    assert 2 <= steps_logged(out) < NUM_STEPS
    resumed = digits.train(config, *paths, *more)
    assert f"resumed from {out}/checkpoints/step_" in resumed
    assert steps_logged(out) == NUM_STEPS
    for name in ("config.yaml", "plot.png", "hf/model.safetensors", "hf/tokenizer.json"):
        assert (out / name).stat().st_size > 0, name

    # What the run has written is a config of the same run, whatever the variables say now.
    monkeypatch.delenv("MODELS")
    printed = run("-m", "sfpo_megatron", "check", str(out / "config.yaml"))
    assert printed == (out / "config.yaml").read_text()
    policy = "model.path=~/läufe/ein lauf $$1/hf"
    alone = ("debug.train_only=null", "rollout.timeout_s=300")
    run("-m", "sfpo_megatron", "eval", str(out / "config.yaml"), policy, *alone)
    (line,) = (out / "eval.jsonl").read_text().splitlines()
    assert json.loads(line)["model"] == str(out / "hf")

    exported = home / "exporté"
    run(
        str(TOOLS / "convert_megatron_to_hf.py"),
        f"--checkpoint={out / 'checkpoints'}",
        f"--out={exported}",
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (exported, out / "hf")]
    assert weights[0] == weights[1]

    assert os.listdir(cwd) == []
    assert sorted(os.listdir(home / "läufe")) == ["ein lauf $1"]
    assert not list(tmp_path.rglob("~*"))
