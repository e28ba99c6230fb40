"""Ranks that end well, badly, or are killed: one line, the exit code, and no process left.

Real torchrun and gloo on two ranks (`rank_script.py`). Not here: Ray and vLLM below rank 0, whose
place a detached `sleep` takes (tests/e2e has the real ones).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import psutil
import pytest
from made.waiting import wait_for

from sfpo_megatron.host.peers import PeerLostError
from sfpo_megatron.launcher.failures import Failure, first_failure, write_error_file
from sfpo_megatron.outputs import stopping
from sfpo_megatron.outputs.directory import RunDirectory

LAUNCH = """
import sys
from sfpo_megatron.launcher.launch import launch
from sfpo_megatron.outputs.directory import RunDirectory
mode, folder = sys.argv[1:]
saves = mode.startswith("stop")
sys.exit(
    launch(
        [mode, folder],
        num_ranks=2,
        directory=RunDirectory.of(folder),
        module="rank_script",
        saves_when_stopped=saves,
    )
)
"""


def start(mode: str, folder: Path) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, mode, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def start_plain(mode: str, folder: Path) -> subprocess.Popen[str]:
    """The same ranks under a torchrun of the user's own."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "rank_script", f"plain_{mode}", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])},
    )


def pids(folder: Path) -> list[int]:
    return [int(pid) for file in folder.glob("pids_*") for pid in file.read_text().split()]


def alive(folder: Path) -> list[int]:
    """Pids of all processes that still run (a zombie does not)."""
    left = []
    for pid in pids(folder):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            left.append(pid)
    return left


def listening_addresses(processes: list[int]) -> set[str]:
    """Local addresses (hexadecimal, as /proc/net has them) on which the processes listen."""
    inodes = set()
    for pid in processes:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
            except OSError:
                continue
    rows = [
        line.split()
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(file).read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.parametrize(
    ("mode", "exit_code", "line"),
    [
        pytest.param("ok", 0, "", marks=pytest.mark.full),
        ("signal_at_exit", 0, ""),
        ("raise", 1, "error: rank 1: ValueError: two lines (traceback: "),
        pytest.param("config", 2, "error: file: key: found a, ", marks=pytest.mark.full),
        pytest.param("kill", 1, "error: rank 1 (pid ", marks=pytest.mark.full),
        ("kill_while_stuck", 1, "error: rank 1 (pid "),
    ],
)
def test_end_of_a_run(tmp_path: Path, mode: str, exit_code: int, line: str) -> None:
    process = start(mode, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == exit_code, err
    assert len(pids(tmp_path)) == 4, err
    assert not alive(tmp_path)
    assert out == ""
    errors = [text for text in err.splitlines() if text.startswith("error:")]
    assert len(errors) == (1 if line else 0), err
    assert "Traceback" not in err and "ChildFailedError" not in err
    if line:
        assert errors[0].startswith(line)
    if mode.startswith("kill"):
        assert "was killed by SIGKILL" in errors[0]
    if mode == "raise":
        assert "two\nlines" in RunDirectory(tmp_path).error_file(1).read_text()


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_signal_ends_all_ranks(tmp_path: Path, signum: signal.Signals) -> None:
    """Rank 0 unwinds (its `finally` runs), rank 1 dies at once, nobody is left."""
    process = start("sleep", tmp_path)
    wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
    time.sleep(1.0)  # past the barrier
    assert listening_addresses([process.pid, *pids(tmp_path)]) == {"0100007F"}  # 127.0.0.1
    began = time.monotonic()
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 128 + signum
    assert [text for text in err.splitlines() if "error" in text] == [
        f"error: stopped by {signum.name}"
    ]
    assert (tmp_path / "closed_0").exists()
    assert not (tmp_path / "closed_1").exists()
    assert not alive(tmp_path)


FULL = pytest.mark.full


def running(family: list[psutil.Process]) -> list[str]:
    """Those that still run."""
    left = []
    for member in set(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            left += [f"{member.status()}: {member.cmdline()}"] if member.is_running() else []
    return left


@pytest.mark.parametrize(
    ("signum", "presses", "after_s"),
    [
        (signal.SIGINT, 3, 1.0),
        *(pytest.param(signal.SIGINT, n, 0.7 * n - 0.6, marks=FULL) for n in (1, 2, 3, 4, 5)),
        *(pytest.param(signal.SIGINT, n, 4.2 - 0.7 * n - 0.6, marks=FULL) for n in (1, 2, 3, 4, 5)),
        pytest.param(signal.SIGHUP, 2, 2.0, marks=FULL),
        pytest.param(signal.SIGQUIT, 2, 2.5, marks=FULL),
        pytest.param(signal.SIGTERM, 2, 3.0, marks=FULL),
    ],
)
def test_signals_while_the_ranks_start(
    tmp_path: Path, signum: signal.Signals, presses: int, after_s: float
) -> None:
    """Anywhere from the import of torchrun to the ranks' first barrier."""
    process = start("sleep", tmp_path)
    wait_for(RunDirectory(tmp_path).logs.exists, timeout_s=30, what="logs/")  # Python itself is up
    time.sleep(after_s)
    launcher = psutil.Process(process.pid)
    family = launcher.children(recursive=True)
    began = time.monotonic()
    for _ in range(presses):
        process.send_signal(signum)
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended at the last press
            family += launcher.children(recursive=True)
        time.sleep(0.1)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signum
    before, _, said = err.rpartition("error: ")
    assert said == f"stopped by {signum.name}\n"  # before it Python's own, of a rank that had not
    assert before == "" or before.endswith("KeyboardInterrupt\n")  # come to our code
    assert not alive(tmp_path) and running(family) == []


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)]
)
def test_a_run_that_saves_is_asked_to_stop(tmp_path: Path, signum: signal.Signals) -> None:
    """The ranks end by themselves, when rank 0 has seen the request; nothing is reported."""
    process = start("stop", tmp_path)
    wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
    time.sleep(1.0)  # past the barrier
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (stopping.STOPPED_EXIT_CODE, "")
    assert RunDirectory(tmp_path).stop_file.read_text() == f"{signum.name}\n"
    assert (tmp_path / "closed_0").exists() and (tmp_path / "closed_1").exists()
    assert not alive(tmp_path)


def test_a_rank_0_that_was_asked_itself_has_its_time(tmp_path: Path) -> None:
    """It does more at the end than the others, whose end is no failure."""
    process = start("stop_slowly", tmp_path)
    wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (stopping.STOPPED_EXIT_CODE, "")
    assert RunDirectory(tmp_path).stop_file.read_text() == "SIGTERM\n"
    assert (tmp_path / "closed_0").exists() and not alive(tmp_path)


@pytest.mark.full
def test_a_second_sigterm_ends_a_run_that_saves(tmp_path: Path) -> None:
    process = start("stop_never", tmp_path)
    wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "stopped by SIGTERM" in err, err
    assert (tmp_path / "closed_0").exists() and not alive(tmp_path)


@pytest.mark.full
def test_a_killed_rank_is_no_request(tmp_path: Path) -> None:
    """torchrun's agent then sends rank 0 the SIGTERM that would ask it to stop."""
    process = start("stop_kill", tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: rank 1 (pid ") and "SIGKILL" in err, err
    assert (tmp_path / "closed_0").exists() and not alive(tmp_path)


def test_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    """The ranks; what they started in other sessions is theirs to end (rank 1 cannot)."""
    process = start("sleep", tmp_path)
    wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
    time.sleep(1.0)
    process.kill()
    process.wait(timeout=30)
    ranks = [int((tmp_path / f"pids_{rank}").read_text().split()[0]) for rank in (0, 1)]
    try:
        wait_for(lambda: not set(ranks) & set(alive(tmp_path)), timeout_s=10, what="the ranks' end")
        assert (tmp_path / "closed_0").exists()
    finally:
        for pid in alive(tmp_path):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_second_run_in_one_directory_ends_at_once(tmp_path: Path) -> None:
    """It names the first and touches nothing: not even a stop request to the first, or what the
    first's ranks have left. The first goes on; killed, it leaves no obstacle."""
    first = start("stop_never", tmp_path)
    folder, ranks = RunDirectory(tmp_path), list[int]()
    try:
        wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
        ranks += alive(tmp_path)
        folder.error_file(1).write_text("error: rank 1: X\n")
        folder.stop_file.touch()
        before = files(tmp_path)
        second = start("stop", tmp_path)
        out, err = second.communicate(timeout=30)
        assert (second.returncode, out) == (1, "")
        assert err.splitlines() == [
            f"error: output_dir: found another run in {tmp_path} (pid {first.pid} on "
            f"{socket.gethostname()}, {started(folder)}), expected none; wait for its end, stop it "
            f"with `kill {first.pid}` on {socket.gethostname()}, or set another output_dir"
        ]
        assert files(tmp_path) == before
        assert first.poll() is None and alive(tmp_path) == ranks and len(ranks) == 4
        first.kill()  # as one that is requeued after kill -9: rank 0 is still closing
        third = start("ok", tmp_path)
        _, err = third.communicate(timeout=60)
        assert (third.returncode, err) == (0, "")
        assert not folder.stop_file.exists() and not folder.error_file(1).exists()
    finally:
        first.kill()
        end(ranks)  # its rank 1's child, which has the pipe
        first.communicate()


def end(processes: list[int]) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def started(folder: RunDirectory) -> str:
    content = json.loads(folder.lock.read_text())
    return f"{content['command']!r}, since {content['started']}"


@pytest.mark.full
def test_a_second_torchrun_in_one_directory_ends_at_once(tmp_path: Path) -> None:
    """Without our launcher: rank 0 has the directory. torchrun ends the others of the second run by
    SIGTERM, which must not become a stop request to the first."""
    first = start_plain("stop_never", tmp_path)
    ranks: list[int] = []
    try:
        wait_for(lambda: len(pids(tmp_path)) == 4, timeout_s=60, what="all processes")
        ranks += alive(tmp_path)
        before = files(tmp_path)
        second = start_plain("stop", tmp_path)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "output_dir: found another run in" in lines[0], err
        assert files(tmp_path) == before
        assert first.poll() is None and alive(tmp_path) == ranks and len(ranks) == 4
        end(ranks)
        first.communicate(timeout=60)
        third = start_plain("ok", tmp_path)
        _, err = third.communicate(timeout=60)
        assert third.returncode == 0, err
    finally:
        first.kill()
        end(ranks)
        first.communicate()


def test_the_first_cause_is_named(tmp_path: Path) -> None:
    """A kill before an exception, an older exception before a younger, our own signals last."""
    folder = RunDirectory(tmp_path)
    folder.logs.mkdir()

    def left(rank: int, when: float, kind: Literal["raised", "peer"], exit_code: int = 1) -> None:
        line = f"error: rank {rank}: X"
        Failure(kind=kind, time=when, message=line, exit_code=exit_code).write(folder, rank)

    left(0, 200.0, "raised")
    left(2, 100.0, "raised")
    failures = {3: (-15, 13), 0: (1, 10), 2: (1, 12), 1: (-9, 11)}
    assert first_failure(failures, folder)[0].startswith("error: rank 1 (pid 11) was killed by")
    del failures[1]
    assert first_failure(failures, folder) == ("error: rank 2: X", 1)
    assert first_failure({3: (-15, 13), 4: (143, 14)}, folder)[0] == (
        "error: rank 3 (pid 13) was killed by SIGTERM"
    )
    # Rank 0 had raised; rank 6 lost it and was seen first, so rank 0 got our signal on its way out.
    stopped = stopping.STOPPED_EXIT_CODE
    assert first_failure({0: (stopped, 10), 4: (-15, 14)}, folder) == ("stopped as asked", stopped)
    assert first_failure({0: (stopped, 10), 2: (1, 12)}, folder) == ("error: rank 2: X", 1)
    left(6, 300.0, "peer")
    assert first_failure({6: (1, 16), 7: (stopped, 10)}, folder)[1] == stopped
    for code in (-15, 143):
        assert first_failure({6: (1, 16), 0: (code, 10)}, folder) == ("error: rank 0: X", 1)
    # Rank 8 says that another could not write; the one that could not has an older or younger file.
    left(8, 1.0, "peer")
    assert first_failure({8: (1, 18), 0: (1, 10)}, folder) == ("error: rank 0: X", 1)
    left(9, 1.0, "raised", exit_code=2)  # a wrong config, whatever signal it got on its way out
    for code in (2, -15):
        assert first_failure({9: (code, 19), 0: (1, 10)}, folder) == ("error: rank 9: X", 2)
    assert first_failure({5: (7, 15)}, folder) == (
        "error: rank 5 (pid 15) ended with exit code 7 and no message",
        1,
    )
    for code in (-9, -15, 143):  # the launcher has failed, whatever has become of its rank
        assert first_failure({5: (code, 15)}, folder)[1] == 1


def test_a_failure_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    error = PeerLostError("rank 3 lost a peer")
    line = write_error_file(folder, 3, error, "error: rank 3: x", exit_code=1)
    failure = Failure.read(folder, 3)
    assert failure is not None and failure.kind == "peer" and failure.message == line
    first, empty, *rest = folder.error_file(3).read_text().splitlines()
    assert first == line == f"error: rank 3: x (traceback: {folder.error_file(3)})"
    assert empty == "" and rest[-1].endswith("PeerLostError: rank 3 lost a peer")
    assert Failure.read(folder, 4) is None
    folder.forget_ranks()
    assert Failure.read(folder, 3) is None and not any(folder.logs.iterdir())
