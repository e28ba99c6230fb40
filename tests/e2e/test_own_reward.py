"""A reward function of one's own in whole runs: found from the driver's working directory by actors
that have another one, and logged by name.

Not exercised: two machines (the module has to be on both).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits
import pytest

MINE = """
import os
from sfpo_megatron.rewards import Problem
print("imported in", os.getcwd())
async def score(response: str, prompt: Problem) -> dict[str, float]:
    print("scored", prompt.id)
    return {"reward": response == prompt.answer, "length": len(response), "half": 0.5}
"""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A working directory with mine.py, and a Ray cluster that was started in another one."""
    from ray.cluster_utils import Cluster

    (tmp_path / "cluster").mkdir()
    monkeypatch.chdir(tmp_path / "cluster")
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={**small, "node_ip_address": "127.0.0.1"}
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path / "work")
    try:
        yield tmp_path / "work"
    finally:
        cluster.shutdown()


def config_with_own_reward(folder: Path) -> Path:
    model = digits.make_model(folder / "model")
    return digits.write_config(
        folder,
        model,
        parallel={"tensor": 1},
        train={"num_steps": 1},
        reward={"function": "mine:score", "timeout_s": 20.0},
    )


def check_parts(metrics: dict[str, Any], prefix: str) -> None:
    assert metrics[f"{prefix}reward/half"] == 0.5
    assert 0.0 <= metrics[f"{prefix}reward/length"] <= 8.0
    assert f"{prefix}reward/reward" not in metrics, "the reward is reward_mean"


@pytest.mark.full
def test_eval_on_a_cluster_that_was_started_elsewhere(elsewhere: Path) -> None:
    config = config_with_own_reward(elsewhere)
    done = subprocess.run(
        [sys.executable, "-m", "sfpo_megatron", "eval", str(config)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (elsewhere / "run/eval.jsonl").read_text().splitlines()
    check_parts(json.loads(line), "eval/")
    log = (elsewhere / "run/logs/scoring-0.log").read_text()
    assert "imported in " in log and "scored eval.held_out/" in log
    assert f"imported in {elsewhere}\n" not in log, "the actor has the driver's working directory"


@pytest.mark.full
def test_train_logs_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster of the run's own."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    output = digits.train(config_with_own_reward(tmp_path))
    steps, evals = digits.read_metrics(tmp_path / "run")
    check_parts(steps[0], "")
    for line in evals:
        check_parts(line, "eval/")
    assert "scored sums/" in (tmp_path / "run/logs/scoring-0.log").read_text()
    assert "scored" not in output


def test_a_module_that_does_not_import_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` sees that the name is there; what the import says comes in one message."""
    (tmp_path / "mine.py").write_text("import no_such_package\n" + MINE)
    monkeypatch.chdir(tmp_path)
    config = config_with_own_reward(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "sfpo_megatron", "eval", str(config)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "reward.function: found 'mine:score', but mine does not import" in last
    assert "No module named 'no_such_package'" in last
