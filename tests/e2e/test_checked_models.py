"""What `check` takes, trains: twenty of the generated config.json files, and twenty of the
generated run.yaml files, each in a run of its own.

No engine: made-up rollouts. Not exercised: the others of them, and engines on them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import digits
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from made.run_variants import BASE, Changes, key_changes, run_yaml, write_files
from made.variants import configs, write_weights

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.families.shape import UnsupportedModel, model_shape

pytestmark = pytest.mark.full
NUM = 20
ALIKE_EACH_TIME = settings(
    max_examples=4000,  # what comes after the last that is wanted costs nothing
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def drawn(folder: Path) -> list[Path]:
    """Run configs of models that `check` takes, no two alike."""
    found: dict[str, Path] = {}
    tokenizer = tiny.make_model(folder / "tokenizer", vocabulary=digits.VOCABULARY)
    digits.save_rollouts(folder / "rollouts.safetensors", num_steps=1)

    @ALIKE_EACH_TIME
    @given(configs())
    def draw(config: dict[str, Any]) -> None:
        text = json.dumps(config, sort_keys=True)
        try:
            shape = model_shape(config)
        except UnsupportedModel:
            return
        if text in found or len(found) == NUM:
            return
        place = folder / f"{len(found)}-{shape.family}"
        model = place / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(text)
        write_weights(model, shape, 1)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((tokenizer / name).read_bytes())
        run = digits.write_config(
            place,
            model,
            parallel={"tensor": 1},
            train={"num_steps": 1, "prompts_per_step": 8, "group_size": 4},
            debug={"train_only": str(folder / "rollouts.safetensors")},
        )
        command = [sys.executable, "-m", "sfpo_megatron", "check", str(run), "--world-size", "1"]
        if subprocess.run(command, capture_output=True).returncode == 0:
            found[text] = run

    draw()
    assert len(found) == NUM
    return list(found.values())


def test_what_check_takes_trains(tmp_path: Path) -> None:
    failed = {}
    for config in drawn(tmp_path):
        process = digits.start_train(config, environment={"OMP_NUM_THREADS": "1"})
        output, _ = process.communicate(timeout=240)
        if process.returncode == 0:
            (step,), _ = digits.read_metrics(config.parent / "run")
        if process.returncode or not step["grad_norm"] > 0:
            shape = json.loads((config.parent / "model/config.json").read_text())
            failed[json.dumps(shape)] = output
    assert not failed, os.linesep.join(f"{shape}\n{output}" for shape, output in failed.items())


# ---- run.yaml ----------------------------------------------------------------------------------

OF_A_STEP = ("model", "megatron", "train", "sfpo", "objective", "checkpoint", "trace", "rollout")
"""Sections that make a train step another one."""


def drawn_runs(folder: Path) -> list[Path]:
    """Folders of run.yaml files that `check` takes, no two of which change the same sections."""
    found: dict[frozenset[str], Path] = {}
    model = tiny.make_model(folder / "model", vocabulary=digits.VOCABULARY)
    unchanged = load_config(None, [f"{key}={json.dumps(BASE[key])}" for key in BASE])

    @ALIKE_EACH_TIME
    @given(key_changes())
    def draw(changes: Changes) -> None:
        if len(found) == NUM:
            return
        place = folder / str(len(found))
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        write_files(place, model)
        (place / "run.yaml").write_text(run_yaml(changes, saved=True))
        with contextlib.chdir(place), contextlib.suppress(ConfigError):
            config = load_config("run.yaml")
            check_config(config, file="run.yaml", for_training=True)
            sections = frozenset(
                name for name in OF_A_STEP if getattr(config, name) != getattr(unchanged, name)
            )
            if sections:
                found.setdefault(sections, place)

    draw()
    assert len(found) == NUM
    return list(found.values())


def test_what_check_takes_of_run_configs_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values anywhere in run.yaml, of which `check` has nothing to say."""
    monkeypatch.setenv("HOME", str(tmp_path))
    failed = {}
    for place in drawn_runs(tmp_path):
        monkeypatch.chdir(place)
        config = load_config("run.yaml")
        process = digits.start_train(Path("run.yaml"), environment={"OMP_NUM_THREADS": "1"})
        output, _ = process.communicate(timeout=240)
        last = f"step {config.train.steps}/{config.train.steps}"
        if process.returncode or ("console" in config.tracking.sinks and last not in output):
            failed[(place / "run.yaml").read_text()] = output
    assert not failed, os.linesep.join(f"{text}\n{output}" for text, output in failed.items())
