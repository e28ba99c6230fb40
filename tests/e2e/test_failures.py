"""A run that cannot go on: one clear message within 30 s, exit code not 0, and no process, socket,
temporary file or shared memory of it left; the last also where a run ends well.

All runs have a TMPDIR that is too long for sockets. Errors found before anything starts are in
tests/unit; dead engines as the client sees them in test_zz_dead_engine.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import digits
import psutil
import pytest
from made.waiting import wait_for

from sfpo_megatron.rollout.lifeline import shared_memory

LIMIT_S = 30
LONG = "job-directory-of-a-cluster-" + 61 * "x"


class Traces:
    """What a run has outside of its output_dir, as long as it is looked at."""

    def __init__(self, process: subprocess.Popen[str], tmpdir: Path) -> None:
        self._process, self._tmpdir = process, tmpdir
        self.family: set[psutil.Process] = set()
        self.folders: set[Path] = set()
        self.segments: set[Path] = set()

    def look(self) -> None:
        self.family |= set(digits.descendants(self._process))
        for member in self.family:
            self.segments |= {Path(path) for path in shared_memory(member.pid)}
            try:
                folder = member.environ().get("TMPDIR")
            except psutil.Error:
                continue
            if folder and Path(folder).name.startswith("sfpo-"):
                self.folders.add(Path(folder))

    def assert_gone(self) -> None:
        _, left = psutil.wait_procs(self.family, timeout=2)
        assert not left, left
        assert not [path for path in (*self.folders, *self.segments) if path.exists()]
        assert not list(self._tmpdir.iterdir())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    model = digits.make_model(folder / "model")
    # Far more steps than the test waits for: the run is alive when it is hit.
    return digits.write_config(
        folder,
        model,
        train={"num_steps": 1000, "prompts_per_step": 16},
        rollout={"max_restarts": 0},
    )


@pytest.fixture
def tmpdir(tmp_path: Path) -> Path:
    """Too long for a socket below it, as a Slurm job's may be."""
    folder = tmp_path / LONG
    folder.mkdir()
    return folder


@pytest.fixture
def running(config: Path, tmpdir: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has made two train steps."""
    metrics = config.parent / "run" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    process = digits.start_train(config, environment={"TMPDIR": str(tmpdir)})

    def two_steps() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return metrics.exists() and metrics.read_text().count('"loss"') >= 2

    try:
        wait_for(two_steps, timeout_s=180, what="two train steps")
        yield process
    finally:
        if process.poll() is None:
            digits.end(process)


def rank_process(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    for child in digits.descendants(process):
        environment = child.environ()
        if environment.get("RANK") == str(rank) and "train" in child.cmdline():
            return child
    raise AssertionError(f"no process of rank {rank}")


def assert_ends(
    process: subprocess.Popen[str], hit: psutil.Process, signum: int, tmpdir: Path
) -> str:
    """Send the signal; the output of a run that ended in time, with an error and nothing left."""
    traces = Traces(process, tmpdir)
    traces.look()  # no segment has a name here: engines of one rank need none, refits unlink theirs
    assert traces.folders
    begun = time.monotonic()
    os.kill(hit.pid, signum)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert time.monotonic() - begun < LIMIT_S
    assert process.returncode != 0
    traces.assert_gone()
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "Traceback" not in output
    return errors[0]


def test_killed_rank_is_named(running: subprocess.Popen[str], tmpdir: Path) -> None:
    error = assert_ends(running, rank_process(running, 1), signal.SIGKILL, tmpdir)
    assert "rank 1" in error and "SIGKILL" in error


@pytest.mark.full
def test_killed_main_rank_is_named(running: subprocess.Popen[str], tmpdir: Path) -> None:
    error = assert_ends(running, rank_process(running, 0), signal.SIGKILL, tmpdir)
    assert "rank 0" in error and "SIGKILL" in error


@pytest.mark.full
def test_dead_engine_is_named(running: subprocess.Popen[str], tmpdir: Path) -> None:
    """With no restart left. Every rank raises it: any of them may be the one that is quoted."""
    error = assert_ends(running, digits.engine_processes(running)[0], signal.SIGKILL, tmpdir)
    assert "engine 0 died" in error and "rollout.max_restarts=0" in error


@pytest.mark.full
def test_engines_lost_for_good_save_the_run(config: Path) -> None:
    """With checkpoints on, the same end is a stop that can be resumed; the reason is said."""
    run = config.parent / "saved"
    process = digits.start_train(config, "checkpoint.every=1000", f"output_dir={run}")
    try:
        metrics = run / "metrics.jsonl"
        wait_for(
            lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 2,
            timeout_s=180,
            what="two train steps",
        )
        digits.engine_processes(process)[0].kill()
        output, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            digits.end(process)
    assert process.returncode == 85, output
    assert "stopped by engine 0 died" in output and "saved" in output
    assert list((run / "checkpoints").iterdir())


@pytest.mark.full
def test_ctrl_c(running: subprocess.Popen[str], tmpdir: Path) -> None:
    """SIGINT to the launcher, as a shell's job control does to the foreground process."""
    error = assert_ends(running, psutil.Process(running.pid), signal.SIGINT, tmpdir)
    assert "SIGINT" in error
    assert running.returncode == 130


@pytest.mark.full
def test_killed_launcher_leaves_nothing(running: subprocess.Popen[str], tmpdir: Path) -> None:
    traces = Traces(running, tmpdir)
    traces.look()
    running.kill()
    running.communicate(timeout=LIMIT_S)
    wait_for(
        lambda: not any(member.is_running() for member in traces.family),
        timeout_s=LIMIT_S,
        what="the end of what the launcher had started",
    )
    traces.assert_gone()


@pytest.mark.full
@pytest.mark.parametrize("presses", range(1, 6))
def test_any_number_of_ctrl_c_while_engines_start(config: Path, tmpdir: Path, presses: int) -> None:
    moments = random.Random(presses)
    process = digits.start_train(config, environment={"TMPDIR": str(tmpdir)})
    traces = Traces(process, tmpdir)
    try:
        end = time.monotonic() + moments.uniform(0.5, 25.0)
        while time.monotonic() < end:
            traces.look()
            time.sleep(0.1)
        begun = time.monotonic()
        for _ in range(presses):
            traces.look()
            process.send_signal(signal.SIGINT)
            time.sleep(moments.choice((0.0, 0.1, 2.0)))
        output, _ = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            digits.end(process)
    assert time.monotonic() - begun < LIMIT_S
    assert process.returncode == 130, output
    assert output.count("error:") == 1 and "Traceback" not in output, output
    traces.assert_gone()


@pytest.mark.full
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_run_that_ends_well_leaves_nothing(config: Path, tmpdir: Path, command: str) -> None:
    process = digits.start_train(
        config,
        "train.num_steps=2",
        f"output_dir={config.parent / 'well'}",
        environment={"TMPDIR": str(tmpdir)},
        command=command,
    )
    traces = Traces(process, tmpdir)
    while process.poll() is None:
        traces.look()
        time.sleep(0.3)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert traces.folders
    traces.assert_gone()


@pytest.mark.full
def test_full_memory_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends its workers when the machine's memory is nearly full: here from 1% on."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    process = digits.start_train(config)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "the machine's memory is nearly full" in errors[0], output
    assert "Traceback" not in output


def test_wrong_line_of_the_data_is_named(config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    good = '{"prompt": "1+1=", "answer": "2"}\n'
    bad.write_text(good + '{"prompt": "1+1="}\n' + 20 * good)  # rows enough for a batch
    process = digits.start_train(config, f"data.train.0.path={bad}")
    begun = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"{bad}:2" in output and "answer" in output, output
    assert output.count("error:") == 1, output
    assert time.monotonic() - begun < 60
