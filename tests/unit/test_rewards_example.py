"""examples/your_own/reward.*: the config passes `check`, and its reward scores as it says.

Not exercised here: that it trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.parts import part_means
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/your_own/reward.yaml"


def test_check_passes_and_it_is_the_demo_with_another_reward(
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)  # the example is found in the working directory
    model = model_dir()
    assert cli.main(["check", str(CONFIG), f"model.path={model}"]) == 0
    assert "reward" not in capsys.readouterr().err, "a warning about the reward"
    config, demo = load_config(CONFIG), load_config(ROOT / "examples/demo/config.yaml")
    changed = dataclasses.replace(demo, output_dir=config.output_dir, model=config.model)
    assert dataclasses.replace(changed, reward=config.reward) == config
    assert config.reward != demo.reward


def test_it_scores_in_the_scoring_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    problem = WireProblem(id="aiw/0", question="?", answer="7", metadata={})
    responses = ["7", " 7\n", "8", "-7", "seven", "", "7."]
    with ScoringPool(load_config(CONFIG).reward, RunDirectory.of(tmp_path)) as pool:
        scores = pool.score([(problem, response) for response in responses])
    assert [score.reward for score in scores] == [1.0, 1.0, 0.1, 0.1, 0.0, 0.0, 0.0]
    assert [score.correct for score in scores] == [True] * 2 + [False] * 5
    assert part_means(scores, "reward/") == {"reward/number": 4 / 7}
