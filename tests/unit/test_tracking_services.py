"""The sinks tensorboard, wandb and mlflow: what the real libraries read back of what they wrote.

Installs the libraries of the three extras into an environment of its own (network, a minute). Not
exercised: servers; wandb is offline, mlflow's store is a local database. Nor what a start that is
killed leaves behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made import services

pytestmark = pytest.mark.full

SINKS = ("tensorboard", "wandb", "mlflow")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return services.make_venv(tmp_path_factory.mktemp("services"), *SINKS)


def read(python: Path, folder: Path, sink: str) -> Any:
    done = services.run(python, "read", str(folder), sink)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def resumed(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, all three sinks at once: its first start has ended after the third, with a
    checkpoint of the second, from which another start has gone on."""
    folder = tmp_path_factory.mktemp("run")
    for steps, continued in (("0,1,2,3", "0"), ("3,4", "2")):
        arguments = (str(folder), ",".join(SINKS), steps, continued)
        done = services.run(python, "write", *arguments, HOME=str(folder / "home"))
        assert done.returncode == 0 and "gets nothing more" not in done.stderr, done.stderr
        # Without a key, and without a question at the terminal: offline, and said once.
        assert done.stderr.count("wandb is not online") == 1, done.stderr
    return folder


def test_tensorboard_shows_one_curve(python: Path, resumed: Path) -> None:
    """Step 3 as it was made again: what the first start had logged of it is purged."""
    (found,) = read(python, resumed, "tensorboard").items()
    name, run = found
    assert name == services.RUN_ID
    assert run["scalars"]["loss"] == {"1": 1.0, "2": 2.0, "3": 23.0, "4": 24.0}
    accuracies = {str(step): pytest.approx(value) for step, value in services.BEST.items()}
    assert run["scalars"]["eval/accuracy"] == accuracies
    assert run["scalars"]["sfpo_active"]["4"] == 1.0 and "nothing" not in run["scalars"]
    assert "step" not in run["scalars"]


def test_tensorboard_has_config_distributions_samples_and_the_table(
    python: Path, resumed: Path
) -> None:
    run = read(python, resumed, "tensorboard")[services.RUN_ID]
    assert run["lr"] == 1e-6 and run["output_dir"] == str(resumed)
    assert "num_fast_passes: 3" in run["texts"]["config"][0]
    assert run["texts"]["progress"][-1] == "    the table\n      at the end\n"
    assert "| 4 é" in run["texts"]["samples"][-1]
    assert run["histograms"]["distribution/response_tokens"] == [3.0] * 4


def test_wandb_continues_the_same_run(python: Path, resumed: Path) -> None:
    """One id in both starts; each row of history has the step, so that the service puts the second
    start's behind those of the first."""
    first, second = read(python, resumed, "wandb")
    for one in (first, second):
        assert one["id"] == services.RUN_ID and one["project"] == "tried"
        assert one["name"] == resumed.name and one["lr"] == 1e-6 and one["exit"] == 0
    rows = {row["_step"]: row for row in first["history"]}
    assert sorted(rows) == [0, 1, 2, 3]
    assert rows[2]["loss"] == 2.0 and rows[2]["eval/accuracy"] == 0.25  # one row a step
    assert rows[2]["distribution/response_tokens/_type"] == "histogram"
    assert "nothing" not in rows[2]
    again = {row["_step"]: row for row in second["history"]}
    assert sorted(again) == [3, 4] and again[4]["loss"] == 24.0


def test_wandb_has_config_samples_and_the_table(python: Path, resumed: Path) -> None:
    *_, last = read(python, resumed, "wandb")
    assert "num_fast_passes: 3" in last["files"]["run-config.yaml"]
    assert last["files"]["progress.txt"].endswith("the table\n  at the end\n")
    row = next(row for row in last["history"] if row["_step"] == 4)
    table = json.loads(last["files"][row["samples/path"]])
    values = dict(zip(table["columns"], table["data"][0], strict=True))
    assert values["response"] == "4 é\n2" and values["answer"] == "42" and values["step"] == 4


def test_mlflow_continues_the_same_run(python: Path, resumed: Path) -> None:
    (run,) = read(python, resumed, "mlflow")
    assert run["id"] == services.RUN_ID and run["name"] == resumed.name
    assert run["status"] == "FINISHED" and float(run["lr"]) == 1e-6
    # mlflow keeps both values of a step that was made twice.
    assert run["metrics"]["loss"] == [[1, 1.0], [2, 2.0], [3, 3.0], [3, 23.0], [4, 24.0]]
    assert run["metrics"]["eval/accuracy"] == [[s, v] for s, v in services.BEST.items()]
    assert "num_fast_passes: 3" in run["files"]["config.yaml"]
    assert run["files"]["progress.txt"].endswith("the table\n  at the end")
    table = json.loads(run["files"]["samples/step-000004.json"])
    assert dict(zip(table["columns"], table["data"][0], strict=True))["response"] == "4 é\n2"


def test_a_run_that_fails_is_marked_so(python: Path, tmp_path: Path) -> None:
    arguments = (str(tmp_path), "wandb,mlflow", "1", "0", "broken")
    done = services.run(python, "write", *arguments, WANDB_MODE="offline")
    assert done.returncode == 1 and "RuntimeError: broken" in done.stderr
    (there,), (local,) = read(python, tmp_path, "mlflow"), read(python, tmp_path, "wandb")
    assert there["status"] == "FAILED" and local["exit"] == 1


def test_a_server_that_is_not_there_ends_no_run(python: Path, tmp_path: Path) -> None:
    """Nothing listens on that port: mlflow is named once and left out, wandb goes offline."""
    nobody = "http://127.0.0.1:1"
    variables = {
        "MLFLOW_TRACKING_URI": nobody,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "WANDB_BASE_URL": nobody,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "3",
    }
    arguments = (str(tmp_path), "mlflow,wandb,jsonl", "1,2", "0")
    done = services.run(python, "write", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mlflow failed and gets nothing more") == 1, done.stderr
    assert done.stderr.count("wandb is not online") == 1, done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (local,) = read(python, tmp_path, "wandb")
    assert [row["_step"] for row in local["history"]] == [1, 2]
