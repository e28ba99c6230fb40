"""What a killed actor leaves: its guard ends its processes, and removes sockets and shared memory.

A plain process is in the actor's place and one with a segment in EngineCore's; real ones are in
tests/e2e/test_failures.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sfpo_megatron.host.processes import ProcessIdentity
from sfpo_megatron.host.scratch import remove_tree
from sfpo_megatron.rollout.lifeline import Lifeline

ACTOR = """
import os, subprocess, sys, tempfile, time
from pathlib import Path
from typing import Any
from sfpo_megatron.rollout.lifeline import Lifeline

lifeline = Lifeline(watch=True)
core = subprocess.Popen([sys.executable, "-c", '''
import time
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=4096)
import mmap, secrets  # as vLLM's own, in C++
theirs = f"vllm_dist_{secrets.token_hex(8)}-tp:0-[0-1]-cpushm_0"
with open(f"/dev/shm/{theirs}", "wb+") as stream:
    stream.truncate(4096)
    mapped = mmap.mmap(stream.fileno(), 4096)
print(segment.name, theirs, flush=True)
time.sleep(600)
'''], stdout=subprocess.PIPE, text=True, start_new_session=True)
name = core.stdout.readline().strip()
lifeline.update_guard()
if sys.argv[1] == "late":  # a second segment, which nobody names to the guard
    from multiprocessing.shared_memory import SharedMemory
    known = SharedMemory(create=True, size=4096)  # and with it its keeper
    lifeline.update_guard()
    lifeline._lock.acquire()
    late = SharedMemory(create=True, size=4096)
    name += f" {known.name} {late.name}"
Path(tempfile.gettempdir(), "socket").touch()
guard = lifeline._guard.pid
print(core.pid, guard, tempfile.gettempdir(), name, flush=True)
time.sleep(600)
"""


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as path:
        yield Path(path)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("how", ["named", "late"])
def test_a_killed_actor_leaves_nothing(short: Path, how: str) -> None:
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR, how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(short)},
    )
    assert actor.stdout is not None
    core, guard, folder, *names = actor.stdout.readline().split()
    segments = [Path("/dev/shm", name) for name in names]
    assert Path(folder).parent == short and (Path(folder) / "socket").exists()
    assert len(segments) == (4 if how == "late" else 2) and all(s.exists() for s in segments)
    # As a whole job's end: the guard must not go before the others.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(int(guard), signum)
    actor.kill()
    actor.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end and not (gone(int(guard)) and gone(int(core))):
        time.sleep(0.02)
    assert gone(int(core)) and gone(int(guard))
    assert not any(segment.exists() for segment in segments)
    assert not any(short.iterdir())
    actor.stdout.close()


def test_a_guard_whose_actor_is_gone_before_it_has_begun(short: Path) -> None:
    """It ends what it was told of all the same, in silence, a line that was cut off left out."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = ProcessIdentity.of(victim.pid)
    assert found is not None
    read, write = os.pipe()
    os.close(read)  # nobody will hear its pid
    started = subprocess.Popen(
        [sys.executable, "-c", "from sfpo_megatron.rollout.lifeline import main; main()"],
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(write)
    (short / "socket").touch()
    told = f"process {found.pid} {found.start_ticks}\nfolder {short}\nproce"
    _, said = started.communicate(told.encode(), timeout=60)  # stderr ends with the guard itself
    assert said == b""
    victim.wait(timeout=20)
    assert victim.returncode == -signal.SIGKILL and not short.exists()
    short.mkdir()


def test_a_folder_that_another_removes_meanwhile(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short / "outer" / "inner").mkdir(parents=True)
    scandir = os.scandir

    def after_another(path: Any = ".") -> Any:
        if str(path).endswith("inner"):
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", after_another)
    remove_tree(str(short / "outer"))
    assert not (short / "outer").exists()


def test_the_dead_are_forgotten() -> None:
    """Programs of tools come and go by the thousand, and their pids are given to others, whose
    shared memory is not ours to remove."""
    lifeline = Lifeline(watch=False)
    try:
        with subprocess.Popen(["sleep", "600"]) as child:
            members = {one.pid for one in lifeline.processes().members}
            assert members >= {os.getpid(), child.pid}
            child.kill()
        assert child.pid not in {one.pid for one in lifeline.processes().members}
    finally:
        lifeline.close()
