"""examples/objectives/*.yaml: each passes `check` and is the demo with another objective.

Not exercised here: that they train (tests/e2e/test_objectives.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.objective import ObjectiveConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted((EXAMPLES / "objectives").glob("*.yaml"))
IDS = [file.stem for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_check_passes(
    file: Path,
    after_demo: Path,
    model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_dir()
    assert cli.main(["check", str(file), "model.path=model"]) == 0
    assert "objective" not in capsys.readouterr().err, "a warning about the objective"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_is_the_demo_with_another_objective(file: Path) -> None:
    config, demo = load_config(file), load_config(EXAMPLES / "demo" / "config.yaml")
    assert config.output_dir == f"runs/objectives/{file.stem}"
    assert config.model.path == "runs/demo/warm_start/hf"
    changed = replace(demo, output_dir=config.output_dir, model=config.model)
    assert replace(changed, objective=config.objective) == config
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment and 3 <= len(comment) <= 5


def test_no_two_are_the_same() -> None:
    objectives = [load_config(file).objective for file in FILES]
    assert all(one != other for one, other in combinations(objectives, 2)) and len(objectives) == 7
    assert ObjectiveConfig() not in objectives
