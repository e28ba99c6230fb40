"""What `check` takes, trains: twenty of the generated config.json files, one step of each.

No engine: made-up rollouts. Not exercised: the others of them, and engines on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import digits
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from made.variants import configs, write_weights

from sfpo_megatron.families.shape import UnsupportedModel, model_shape

pytestmark = pytest.mark.full
NUM = 20


def drawn(folder: Path) -> list[Path]:
    """Run configs of models that `check` takes, no two alike."""
    found: dict[str, Path] = {}
    tokenizer = tiny.make_model(folder / "tokenizer", vocabulary=digits.VOCABULARY)
    digits.save_rollouts(folder / "rollouts.safetensors", num_steps=1)

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
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
