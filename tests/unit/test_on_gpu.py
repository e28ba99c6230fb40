"""`make gpu`'s stages: limits, rows that a cut run keeps, and that each is there to be run.

Not exercised: the stages themselves but `te` (`python benchmarks/on_gpu.py --device cpu`), GPUs.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made.processes import gone

from benchmarks import on_gpu
from benchmarks.common.demo_run import demo_run
from benchmarks.device_stages import engines
from benchmarks.on_gpu import STAGES, Row, Stage, run_stage, write_rows
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Stages run the code that stands in their `module`; its last argument is the figures' file."""

    def command(stage: Stage, device: torch.device, out: Path) -> list[str]:
        return [sys.executable, "-c", stage.module, str(out)]

    monkeypatch.setattr(on_gpu, "command_of", command)
    return monkeypatch


WRITES = "import sys; open(sys.argv[-1], 'w').write('{\"seconds\": 1.5}')"


def test_a_stage_that_passes_has_its_figures(runs: pytest.MonkeyPatch) -> None:
    row = run_stage(Stage(name="a", limit_s=60, module=WRITES), CPU)
    assert (row.status, row.figures, row.error) == ("passed", {"seconds": 1.5}, "")
    assert 0 < row.seconds < row.limit_s


@pytest.mark.parametrize(
    "code", ["raise AssertionError('other bits')", "print('AssertionError: other bits')"]
)
def test_a_stage_that_fails_says_why(runs: pytest.MonkeyPatch, code: str) -> None:
    """The second ends well and leaves no figures."""
    row = run_stage(Stage(name="a", limit_s=60, module=code), CPU)
    assert row.status == "failed" and row.error.endswith("AssertionError: other bits")


def test_a_stage_that_hangs_is_ended_with_what_it_started(
    runs: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(started.pid))\n"
        "time.sleep(60)"
    )
    begun = time.monotonic()
    row = run_stage(Stage(name="a", limit_s=1, module=code), CPU)
    assert row.status == "too long" and time.monotonic() - begun < 30
    assert gone(int(child.read_text()))


def test_what_is_missing_is_named(runs: pytest.MonkeyPatch) -> None:
    stage = Stage(name="a", limit_s=9, module="1 / 0", needs=("torch", "no_such_package"))
    row = run_stage(stage, CPU)
    assert (row.status, row.error) == ("left out", "needs no_such_package")


def test_stages_need_what_makes_their_model() -> None:
    needs = {stage.name: stage.needs for stage in STAGES}
    assert needs["snapshots"] == ("transformers",)
    makers = {"training", "offload", "fork", "te"}
    assert {name for name, packages in needs.items() if "safetensors" in packages} == makers
    for stage in STAGES:  # by what they import: a file of weights, which `tiny` makes
        if stage.module:
            name = f"benchmarks.device_stages.{stage.module.partition(':')[0]}"
            assert hasattr(importlib.import_module(name), "tiny") == (stage.name in makers)


def test_the_file_is_whole_after_every_row(tmp_path: Path) -> None:
    """On a CPU no feature is shown."""
    file = tmp_path / "results/on_gpu.json"
    rows: list[Row] = []
    for stage in STAGES:
        rows.append(
            Row(stage=stage.name, status="passed", seconds=1, limit_s=9, figures={}, error="")
        )
        write_rows(file, rows, CPU)
        content = json.loads(file.read_text())
        assert [row["stage"] for row in content["rows"]] == [row.stage for row in rows]
        assert content["features"] == [] and content["device"] == "cpu"
    assert os.listdir(file.parent) == ["on_gpu.json"]


def test_the_stages_are_there_and_short_enough() -> None:
    """Eight minutes without vLLM and twelve in all, as the Makefile and docs/gpu.md say."""
    assert sum(stage.limit_s for stage in STAGES if "vllm" not in stage.needs) <= 480
    assert sum(stage.limit_s for stage in STAGES) <= 720
    assert STAGES[-1].needs == ("vllm", "ray")
    known = (ROOT / "tools/verified_features.txt").read_text()
    for stage in STAGES:
        assert bool(stage.module) != bool(stage.script)
        if stage.module:
            module, _, function = stage.module.partition(":")
            found = importlib.import_module(f"benchmarks.device_stages.{module}")
            assert callable(getattr(found, function))
        else:
            assert (ROOT / "benchmarks" / stage.script[0]).is_file()
        for feature in stage.features:
            assert f"\n{feature} | " in known


def test_a_run_without_a_folder_is_refused_before_it_starts() -> None:
    command = [sys.executable, "benchmarks/on_gpu.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--results: found none" in done.stderr, done.stderr


def test_make_bench_runs_every_benchmark_but_two() -> None:
    make = ["make", "-n", "bench", "PY=python"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    every = {file.name for file in (ROOT / "benchmarks").glob("*.py")}
    found = re.search("for file in ([^;]*); do", done.stdout)
    assert found is not None
    assert {Path(f).name for f in found[1].split()} == every - {"on_gpu.py", "vs_trl.py"}


@pytest.mark.full
def test_the_te_stage_over_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its parts: a plain trainer's steps, also with remainders; transformers' logits."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/te_standin")])
    monkeypatch.setenv("PYTHONPATH", paths)
    (stage,) = (stage for stage in STAGES if stage.name == "te")
    row = run_stage(replace(stage, needs=()), CPU)
    assert row.status == "passed", row.error
    assert row.figures["layers"] == row.figures["adam"] == "te"
    assert row.figures["remainders"]["params_with_remainders"] > 0
    assert row.figures["logits"].keys() == {"alone", "packed"}


def test_every_transport_of_the_engines_stage_is_accepted_on_its_device(tmp_path: Path) -> None:
    """With checksums where the receivers are ours: vLLM's compute none, and are refused with."""
    file, *words = demo_run(tmp_path)
    checked = {}
    for device, transports in engines.TRANSPORTS.items():
        for which in transports:
            given = [*words, *engines.settings(torch.device(device)), *engines.refit_by(which)]
            config = load_config(file, given)
            check_config(config, file=file, on_cpu=device == "cpu", for_training=True)
            checked[device, which] = config.refit.verify_every
    assert checked == {("cuda", "shm"): 1, ("cuda", "ipc"): 0, ("cpu", "shm"): 1}
