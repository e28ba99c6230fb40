"""examples/your_own/: reward.yaml passes `check`, reward.py and server.py score as they say.

Not exercised here: that it trains.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made.servers import free_port

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.reward import HttpRewardConfig, RewardConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.components import part_means
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/your_own/reward.yaml"


def test_check_passes_and_it_is_the_demo_with_another_reward(
    after_demo: Path,  # the reward is found in the working directory
    model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    responses = ["2+5=7\nAnswer: 7", " 7\n", "Answer: 8", "-7", "seven", "2+5=7", "7."]
    with ScoringPool(load_config(CONFIG).reward, RunDirectory.of(tmp_path)) as pool:
        scores = pool.score([(problem, response) for response in responses])
    assert [score.reward for score in scores] == [1.0, 1.0, 0.1, 0.1, 0.0, 0.0, 0.0]
    assert [score.correct for score in scores] == [True] * 2 + [False] * 5
    assert part_means(scores, "reward/") == {"reward/number": 4 / 7}


def test_the_server_scores_as_the_function_does() -> None:
    """The process is started as docs/extend.md says, at a free port."""
    port = free_port()
    command = [sys.executable, str(ROOT / "examples/your_own/server.py"), str(port)]
    problem = WireProblem(id="aiw/0", question="?", answer="7", metadata={})
    http = HttpRewardConfig(url=f"http://127.0.0.1:{port}/", timeout_s=20.0)
    server = subprocess.Popen(command)
    try:
        with ScoringPool(RewardConfig(function="http", http=http)) as pool:  # waits for it
            scores = pool.score([(problem, response) for response in ("Answer: 7", "8", "seven")])
    finally:
        server.kill()
        server.wait()
    assert [score.reward for score in scores] == [1.0, 0.1, 0.0]
    assert part_means(scores, "reward/") == {"reward/number": 2 / 3}
