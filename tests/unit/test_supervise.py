"""Every end of a supervised command, with plain processes in the place of ranks, Ray and vLLM:
the exit code, and that no process, folder, socket or shared memory of it stays.

Real ranks: tests/dist/test_launcher.py; real engines: tests/e2e/test_ends.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from _pytest.mark import ParameterSet

from sfpo_megatron.host.processes import descendants

WORK = """
import os, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
from sfpo_megatron.launcher import supervise as module

mode, folder = sys.argv[1], Path(sys.argv[2])
module.LIMIT_S = 1.0

(folder / "up").touch()

def work():
    time.sleep(0.3 if mode == "slow" else 0.0)
    sleep = ["sleep", "600"]
    if mode == "stubborn":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    child = subprocess.Popen(sleep, start_new_session=True)  # as Ray's are
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(tempfile.gettempdir(), "s" * 64))
    code = int(mode) if mode.isdecimal() else 130
    signal.signal(signal.SIGINT, lambda *_: sys.exit(code))
    try:
        return go_on(child)
    finally:
        time.sleep(0.3)  # as rank 0 closes its engines; a second signal would cut it short
        (folder / "closed").touch()

def go_on(child):
    (folder / "where").write_text(tempfile.gettempdir())
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    if mode == "code":
        child.kill()
        return 7
    time.sleep(600)

def ask(signum):
    if mode != "asks":  # a folder that is not there, and cannot be made
        from sfpo_megatron.outputs import stopping
        from sfpo_megatron.outputs.directory import RunDirectory

        return stopping.request(RunDirectory(folder / "pids" / "run"), signum)
    return (folder / "asked").write_text(signum.name) > 0

asked = mode in ("asks", "asks in vain")
sys.exit(module.supervise(work, ask=ask if asked else None))
"""


def full(*parameters: object) -> ParameterSet:
    return pytest.param(*parameters, marks=pytest.mark.full)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for sockets below it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as path:
        yield Path(path)


@contextmanager
def supervised(folder: Path, mode: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command, whose own TMPDIR is `folder`/tmp."""
    (folder / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, mode, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp"), **environment},
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), *pids(folder), process.pid]:
            kill(pid)
        process.communicate()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def pids(folder: Path) -> list[int]:
    file = folder / "pids"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def wait_for(file: Path) -> None:
    end = time.monotonic() + 20
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.01)


def started(folder: Path) -> list[int]:
    end = time.monotonic() + 20
    while len(pids(folder)) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    return pids(folder)


def nothing_is_left(folder: Path, processes: list[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        alive = [pid for pid in processes if is_running(pid)]
        if not alive and not any((folder / "tmp").iterdir()):
            return True
        time.sleep(0.02)
    return False


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("presses", [full(1), full(2), 3, full(4), 5])
def test_any_number_of_ctrl_c_at_any_moment(folder: Path, presses: int) -> None:
    """Moments from before the command's process forks to after it has started others."""
    moments = random.Random(presses)
    with supervised(folder, "slow") as process:
        wait_for(folder / "up")  # Python itself takes no Ctrl-C well
        time.sleep(0.05 + moments.random())
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(moments.choice((0.0, 0.05, 0.3)) * moments.random())
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        assert err == "error: stopped by SIGINT\n"
        assert nothing_is_left(folder, pids(folder))
        assert (folder / "closed").exists() == (folder / "pids").exists()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", full("SIGTERM"), full("SIGQUIT")])
def test_other_signals_end_it_as_well_twice_too(folder: Path, name: str) -> None:
    with supervised(folder) as process:
        processes = started(folder)
        for _ in range(2):
            process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.Signals[name]
        assert err == f"error: stopped by {name}\n"
        assert len(processes) == 2 and nothing_is_left(folder, processes)


@pytest.mark.parametrize(
    ("name", "ended", "code"),
    [
        ("SIGTERM", 1, 143),
        ("SIGTERM", 85, 85),
        full("SIGTERM", 0, 0),
        full("SIGHUP", 2, 129),
        ("SIGINT", 85, 130),
        full("SIGINT", 0, 130),
        full("SIGINT", 1, 130),
    ],
)
def test_the_signal_is_the_exit_code_but_for_an_end_that_a_job_goes_by(
    folder: Path, name: str, ended: int, code: int
) -> None:
    """The work had saved, or was done, when it heard of the end; Ctrl-C is 130 all the same."""
    with supervised(folder, str(ended)) as process:
        started(folder)
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (code, "")


def test_hangups_are_nothing_under_nohup(folder: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with supervised(folder) as process:
            signal.signal(signal.SIGHUP, before)
            started(folder)
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_does_not_end_is_killed(folder: Path) -> None:
    with supervised(folder, "stubborn") as process:
        processes = started(folder)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (130, "error: stopped by SIGINT\n")
        assert nothing_is_left(folder, processes)


def test_a_request_is_one_and_the_second_sigterm_the_end(folder: Path) -> None:
    with supervised(folder, "asks") as process:
        processes = started(folder)
        for name in (
            "SIGUSR1",
            "SIGTERM",
            "SIGUSR1",
        ):  # a job script's, on top of the cluster's own
            process.send_signal(signal.Signals[name])
            time.sleep(0.5)
            assert (folder / "asked").read_text() == name
        assert process.poll() is None and is_running(processes[1])
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (143, "error: stopped by SIGTERM\n")
        assert nothing_is_left(folder, processes)


@pytest.mark.parametrize("name", ["SIGTERM", full("SIGUSR1")])
def test_a_request_that_cannot_be_made_is_the_end(folder: Path, name: str) -> None:
    """A cluster that sends SIGTERM kills soon after: rank 0 closes what it can before that."""
    with supervised(folder, "asks in vain") as process:
        processes = started(folder)
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=20)
        warning, error = err.splitlines()
        assert warning.endswith(f"{name} is not passed on")
        assert process.returncode == 128 + signal.Signals[name]
        assert error == f"error: stopped by {name}"
        assert (folder / "closed").exists() and nothing_is_left(folder, processes)


@pytest.mark.parametrize("which", ["front", "worker"])
def test_killed_one_of_the_two_the_other_ends_all(folder: Path, which: str) -> None:
    with supervised(folder) as process:
        processes = started(folder)
        os.kill(process.pid if which == "front" else processes[0], signal.SIGKILL)
        assert nothing_is_left(folder, processes)
        _, err = process.communicate(timeout=20)
        if which == "worker":
            line = f"error: pid {processes[0]}, which led the run, was killed by SIGKILL\n"
            assert (process.returncode, err) == (1, line)


def test_both_killed_the_next_one_removes_what_they_left(folder: Path) -> None:
    with supervised(folder) as process:
        worker, child = started(folder)
        process.send_signal(signal.SIGSTOP)  # so that it does not tidy up first
        for pid in (worker, process.pid, child):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=20)
    (left,) = (folder / "tmp").iterdir()
    assert str(left) == (folder / "where").read_text() and left.stat().st_mode & 0o777 == 0o700
    (folder / "tmp" / "sfpo-mine").mkdir()  # by its name one of ours
    with supervised(folder, "code") as process:
        process.communicate(timeout=20)
        assert process.returncode == 7
    assert [path.name for path in (folder / "tmp").iterdir()] == ["sfpo-mine"]
