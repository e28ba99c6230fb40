"""One run at a time in a directory: real processes, flock, and its stand-in by heartbeat.

Not exercised: a network file system. One without flock is stood in for by an `fcntl.flock` that
raises what such systems raise. Whole runs: tests/dist/test_launcher.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made.lock_holder import HOLD, holder
from made.waiting import wait_for

from sfpo_megatron.outputs import heartbeat, lock
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import DirectoryNotWritable, Holder, RunInUse
from sfpo_megatron.outputs.lock import RunLock, has, is_anothers


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture(params=["flock", "beat"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either kind of lock, in this process and for `holder`."""
    if request.param == "beat":
        no_flock(monkeypatch)
    return str(request.param)


def no_flock(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOLCK) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.1)


def refused(directory: RunDirectory, run: str = "second") -> str:
    with pytest.raises(RunInUse) as caught, RunLock(directory, run=run):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_second_run_is_told_who_is_first(directory: RunDirectory, how: str) -> None:
    with holder(directory.path, how=how) as first:
        before = directory.lock.read_text()
        message = refused(directory)
        assert message.startswith(f"output_dir: found another run in {directory.path} (pid ")
        assert f"pid {first.pid} on {socket.gethostname()}" in message
        assert f"wait for its end, stop it with `kill {first.pid}` on" in message
        assert message.endswith("or set another output_dir")
        assert directory.lock.read_text() == before
        content = json.loads(before)
        assert content["pid"] == first.pid and content["command"].startswith("-c")
        assert has(directory, "first") and not has(directory, "second")
        assert is_anothers(directory, "second") and not is_anothers(directory, "first")
        first.communicate("")  # it ends in good order
    with RunLock(directory, run="second"):
        assert has(directory, "second")
        assert json.loads(directory.lock.read_text())["pid"] == os.getpid()


def test_a_holder_that_is_killed_leaves_no_obstacle(directory: RunDirectory, how: str) -> None:
    with holder(directory.path, how=how) as first:
        first.kill()
        first.wait()
        with RunLock(directory, run="second"):
            assert has(directory, "second")


def test_a_holder_that_is_killed_and_not_reaped_is_dead(directory: RunDirectory, how: str) -> None:
    with holder(directory.path, how=how) as first:
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        with RunLock(directory, run="second"):
            assert has(directory, "second")


def test_a_fork_does_not_keep_the_lock(directory: RunDirectory) -> None:
    """The child stands for a checkpoint writer that outlives its rank."""
    with holder(directory.path, how="fork") as first:
        first.kill()
        first.wait()
        with RunLock(directory, run="second"):
            assert has(directory, "second")


def test_a_forks_end_does_not_free_the_lock(directory: RunDirectory) -> None:
    with RunLock(directory, run="first"):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert run_elsewhere(directory, "second") != 0
    assert run_elsewhere(directory, "second") == 0


def test_a_fork_that_goes_on_has_nothing_to_release(directory: RunDirectory) -> None:
    """It leaves the block too: its files may have the number of the descriptor that it has not."""
    child = 0
    with RunLock(directory, run="first"):
        before = set(os.listdir("/proc/self/fd"))
        child = os.fork()
        if child == 0:
            files = [os.open("/dev/null", os.O_RDONLY) for _ in before]
        else:
            _, status = os.waitpid(child, 0)
            assert status == 0 and run_elsewhere(directory, "second") != 0
    if child == 0:
        try:
            os._exit(sum(not os.path.exists(f"/proc/self/fd/{file}") for file in files))
        finally:
            os._exit(99)
    assert run_elsewhere(directory, "second") == 0


def test_a_program_that_is_started_does_not_get_the_lock(directory: RunDirectory) -> None:
    """Ray's and vLLM's processes are started so."""
    with RunLock(directory, run="first"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        links = {os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()}
    try:
        assert str(directory.lock) not in links
        assert run_elsewhere(directory, "second") == 0
    finally:
        child.kill()
        child.wait()


def run_elsewhere(directory: RunDirectory, run: str) -> int:
    """Exit code of a process that takes the lock and lets it go: 0, or 1 for RunInUse."""
    command = [sys.executable, "-c", HOLD, str(directory.path), run, "flock"]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=60).returncode


def test_processes_of_one_run_share_it(
    directory: RunDirectory, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher and rank 0; the file names the first. With flock the second keeps it alone."""
    monkeypatch.setattr(lock, "CLOSING_S", 0.2)
    with holder(directory.path, "one", how) as first, RunLock(directory, run="one"):
        assert json.loads(directory.lock.read_text())["pid"] == first.pid
        if how == "flock":
            first.communicate("")
            assert f"pid {first.pid} on" in refused(directory, "two")


def test_the_next_waits_for_what_a_killed_launcher_has_left(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 closes for some seconds; a run that is requeued at once must get the directory."""
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)
    with holder(directory.path, "one") as launcher, holder(directory.path, "one") as rank:
        launcher.kill()
        launcher.wait()
        assert rank.stdin is not None
        timer = threading.Timer(0.5, rank.stdin.close)
        timer.start()
        with RunLock(directory, run="two"):
            assert rank.wait(10) == 0 and has(directory, "two")
        timer.join()


def test_a_lock_file_that_was_removed_holds_nothing_up(directory: RunDirectory) -> None:
    with holder(directory.path):
        directory.lock.unlink()
        with RunLock(directory, run="second"):
            assert has(directory, "second") and run_elsewhere(directory, "third") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00\xff"])
def test_a_foreign_lock_file_is_no_obstacle(directory: RunDirectory, content: str) -> None:
    assert not is_anothers(directory, "one")
    directory.path.mkdir()
    directory.lock.write_text(content)
    assert not is_anothers(directory, "one") and not has(directory, "one")
    with RunLock(directory, run="one"):
        assert has(directory, "one")


@pytest.mark.parametrize("name", ["x" * 300, "file/run", "locked"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, how: str, name: str) -> None:
    """For any user: a name that is too long, a file in the way, a folder in place of the file."""
    (tmp_path / "file").touch()
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(DirectoryNotWritable) as caught,
        RunLock(RunDirectory(tmp_path / name), run="a"),
    ):
        pass
    message = str(caught.value)
    assert message.startswith(f"output_dir: found {tmp_path / name}, where {tmp_path}")
    assert "expected a folder that can; choose another output_dir" in message


def test_many_at_once_and_one_gets_it(directory: RunDirectory, how: str) -> None:
    command = [sys.executable, "-c", HOLD, str(directory.path)]
    processes = [
        subprocess.Popen(
            [*command, f"run {n}", how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(6)
    ]
    try:
        wait_for(
            lambda: sum(p.poll() is None for p in processes) == 1,
            timeout_s=60,
            what="the one that has it",
        )
        (winner,) = (p for p in processes if p.poll() is None)
        assert winner.stdout is not None and winner.stdout.readline() == "held\n"
        for process in processes:
            if process is not winner:
                assert "RunInUse: output_dir: found another run in" in process.communicate()[1]
        assert json.loads(directory.lock.read_text())["pid"] == winner.pid
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# ---- without flock -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", [errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EIO]
)
def test_without_flock_a_heartbeat_is_said_once(
    directory: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    no_flock(monkeypatch, code)
    with caplog.at_level(logging.WARNING), RunLock(directory, run="one"):
        with RunLock(directory, run="one"):
            pass
        assert directory.heartbeat.exists(), "the second of a run does not remove it"
        before = directory.heartbeat.stat().st_mtime_ns
        wait_for(lambda: directory.heartbeat.stat().st_mtime_ns > before, timeout_s=60, what="beat")
    (record,) = caplog.records
    assert os.strerror(code) in record.getMessage() and "heartbeat" in record.getMessage()
    assert not directory.heartbeat.exists()


def test_a_killed_holder_of_the_same_name_beats_no_more(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is requeued onto its nodes: its address, port and id are those it had."""
    no_flock(monkeypatch)
    with holder(directory.path, "job 7", "beat") as killed:
        killed.kill()
        killed.wait()
    with RunLock(directory, run="job 7"):
        beating = Holder.read(directory.heartbeat)
        assert beating is not None and beating.pid == os.getpid()
        assert Holder.read(directory.lock) == beating
        before = directory.heartbeat.stat().st_mtime_ns
        wait_for(lambda: directory.heartbeat.stat().st_mtime_ns > before, timeout_s=60, what="beat")
    assert not directory.heartbeat.exists()


def elsewhere(directory: RunDirectory, run: str = "first") -> Holder:
    """A holder on another host, as its files say."""
    there = replace(Holder.this_process(run), host="another-host", pid=1)
    directory.path.mkdir(exist_ok=True)
    directory.heartbeat.write_text(there.to_json())
    return there


def test_a_heart_that_beats_on_another_host(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused as soon as it has beaten, whatever the two hosts' clocks say."""
    no_flock(monkeypatch)
    elsewhere(directory)
    hour_ago = time.time() - 3600
    beats = iter(range(1, 100_000))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(directory.heartbeat, (hour_ago, hour_ago + next(beats)))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "pid 1 on another-host" in refused(directory)
    finally:
        ended.set()
        thread.join()
    assert directory.heartbeat.exists()


def test_a_heart_that_has_stopped_on_another_host(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_flock(monkeypatch)
    monkeypatch.setattr(heartbeat, "LIMIT_S", 0.5)
    elsewhere(directory)
    with RunLock(directory, run="second"):
        assert Holder.read(directory.heartbeat) == Holder.read(directory.lock)
        assert has(directory, "second")
    assert [file.name for file in directory.path.iterdir()] == [".lock"]


def test_a_holder_on_another_host_that_ends_is_not_waited_for(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_flock(monkeypatch)
    elsewhere(directory)
    timer = threading.Timer(0.3, directory.heartbeat.unlink)
    timer.start()
    with RunLock(directory, run="second"):
        assert has(directory, "second")
    timer.join()


def test_who_is_taken_for_dead_says_so_and_leaves_the_other_alone(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_flock(monkeypatch)
    with caplog.at_level(logging.ERROR), RunLock(directory, run="first"):
        there = elsewhere(directory, "second")
        wait_for(lambda: bool(caplog.records), timeout_s=60, what="a warning")
    assert "another run has taken this one for dead" in caplog.text
    assert Holder.read(directory.heartbeat) == there


def test_a_heart_goes_on_after_a_file_system_that_was_away(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the server is no other run: a heart that stops for it is taken for dead."""
    no_flock(monkeypatch)
    utime = os.utime
    with caplog.at_level(logging.WARNING), RunLock(directory, run="first"):

        def away(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "utime", away)
        wait_for(lambda: "no heartbeat now" in caplog.text, timeout_s=60, what="a warning")
        monkeypatch.setattr(os, "utime", utime)
        before = directory.heartbeat.stat().st_mtime_ns
        wait_for(lambda: directory.heartbeat.stat().st_mtime_ns > before, timeout_s=60, what="beat")
    assert "another run has taken this one" not in caplog.text
