"""When a run is asked to stop, and whether there is time left. Signals to a whole run:
tests/e2e/test_resume.py.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron.outputs import stopping
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.stopping import OutOfTime, StopRequested, StopWatch


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ask(folder: Path, clock: Clock, who: str = "SIGUSR1\n") -> None:
    file = RunDirectory(folder).stop_file
    file.write_text(who)
    os.utime(file, (clock.now, clock.now))


def test_nobody_asked(tmp_path: Path, clock: Clock) -> None:
    watch = StopWatch(RunDirectory(tmp_path), must_save_within_s=1.0, clock=clock)
    assert watch.reason is None
    watch.check(1e9)


def test_before_the_first_step_there_is_nothing_to_wait_for(tmp_path: Path, clock: Clock) -> None:
    watch = StopWatch(RunDirectory(tmp_path), clock=clock)
    ask(tmp_path, clock)
    with pytest.raises(StopRequested, match="SIGUSR1"):
        watch.check()


@pytest.mark.parametrize(
    ("limit_s", "later_s", "remaining_s", "save_s", "in_time"),
    [
        (None, 1e6, 1e6, 1e6, True),
        (60, 0, 0, 0, True),
        (60, 59, 0, 0, True),
        (60, 61, 0, 0, False),
        (60, 10, 49, 0, True),
        (60, 10, 51, 0, False),
        (60, 10, 40, 9, True),
        (60, 10, 40, 11, False),
    ],
)
def test_time_left(
    tmp_path: Path,
    clock: Clock,
    limit_s: float | None,
    later_s: float,
    remaining_s: float,
    save_s: float,
    in_time: bool,
) -> None:
    watch = StopWatch(RunDirectory(tmp_path), must_save_within_s=limit_s, clock=clock)
    watch.steps_begin()
    watch.saved(save_s)
    ask(tmp_path, clock)
    clock.now += later_s
    if in_time:
        watch.check(remaining_s)
        assert watch.reason == "SIGUSR1"
    else:
        with pytest.raises(OutOfTime, match="SIGUSR1"):
            watch.check(remaining_s)


def test_an_empty_file_is_a_request(tmp_path: Path, clock: Clock) -> None:
    """`touch RUN/stop-requested` in a batch script."""
    watch = StopWatch(RunDirectory(tmp_path), clock=clock)
    ask(tmp_path, clock, "")
    assert watch.reason == "stop-requested"
    stopping.forget(RunDirectory(tmp_path))
    assert StopWatch(RunDirectory(tmp_path), clock=clock).reason is None
    stopping.forget(RunDirectory(tmp_path))  # again: nothing to forget


@pytest.mark.parametrize(
    ("environ", "at_s", "stops"),
    [
        ({stopping.JOB_END: "2000"}, 1879, False),
        ({stopping.JOB_END: "2000"}, 1881, True),
        ({}, 1e9, False),
        ({stopping.JOB_END: "soon"}, 1e9, False),
    ],
)
def test_end_of_the_slurm_job(
    tmp_path: Path, clock: Clock, environ: dict[str, str], at_s: float, stops: bool
) -> None:
    watch = StopWatch(
        RunDirectory(tmp_path), stop_before_walltime_s=120, environ=environ, clock=clock
    )
    clock.now = at_s
    assert (watch.reason is not None) is stops


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.usefixtures("handlers")
def test_a_signal_writes_the_file(tmp_path: Path, signum: signal.Signals) -> None:
    stopping.request_on_signal(RunDirectory(tmp_path), signal.SIGTERM, signal.SIGUSR1)
    os.kill(os.getpid(), signum)
    os.kill(os.getpid(), signal.SIGUSR1)  # a second one changes nothing
    assert StopWatch(RunDirectory(tmp_path)).reason == signum.name


@pytest.mark.usefixtures("handlers")
def test_a_signal_of_a_run_that_has_not_the_directory_ends_it(tmp_path: Path) -> None:
    """torchrun ends the ranks of a second run by SIGTERM: the first run must not hear of it."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sfpo_megatron.outputs import stopping\n"
        "from sfpo_megatron.outputs.directory import RunDirectory\n"
        "directory = RunDirectory(Path(sys.argv[1]))\n"
        "stopping.request_on_signal(directory, signal.SIGTERM, is_ours=lambda: False)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert not RunDirectory(tmp_path).stop_file.exists()


def test_a_request_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is raised in a signal handler, in the middle of anything."""
    (tmp_path / "run").touch()  # a file where the folder should be
    directory = RunDirectory(tmp_path / "run")
    assert not stopping.request(directory, signal.SIGTERM)
    assert capfd.readouterr().err == (
        f"warning: {directory.stop_file}: [Errno 17] File exists: "
        f"'{directory.path}': SIGTERM is not passed on\n"
    )


@pytest.mark.usefixtures("handlers")
def test_rank_0_hears_of_a_request_that_cannot_be_written(
    tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under plain torchrun no process in front ends the run instead."""
    (tmp_path / "run").touch()
    directory = RunDirectory(tmp_path / "run")
    watch = StopWatch(directory, must_save_within_s=60.0, clock=clock)
    watch.steps_begin()
    stopping.request_on_signal(directory, signal.SIGTERM)
    assert watch.reason is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.reason == "SIGTERM"
    assert capfd.readouterr().err.endswith(
        ": SIGTERM is known to this rank alone: rank 0 saves and stops, another goes on\n"
    )
    watch.check()
    clock.now += 61
    with pytest.raises(OutOfTime, match="SIGTERM"):
        watch.check()
    (tmp_path / "run").unlink()
    stopping.forget(directory)
    assert watch.reason is None


@pytest.mark.parametrize("method", ["stat", "read_text"])
def test_a_file_that_cannot_be_looked_at_ends_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A file system that is away for a moment; a request that only root can read is one."""
    watch = StopWatch(RunDirectory(tmp_path), clock=clock)
    ask(tmp_path, clock)

    def fails(file: Path, **more: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(Path, method, fails)
        assert watch.reason == (None if method == "stat" else "stop-requested")
    assert watch.reason == "SIGUSR1"


def test_on_a_full_disk_the_empty_file_is_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(file: Path, text: str, encoding: str) -> None:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(Path, "write_text", full)
    assert stopping.request(RunDirectory(tmp_path), signal.SIGTERM)
    assert capfd.readouterr().err == "" and StopWatch(RunDirectory(tmp_path)).reason
