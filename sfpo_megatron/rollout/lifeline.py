"""Ends an actor's child processes when the actor is gone, however it went.

vLLM's EngineCore outlives a parent that is killed with SIGKILL (its workers do watch EngineCore,
EngineCore watches nobody). The guard is a small process of its own session that reads the
children's identities from a pipe; the pipe closes when the actor ends, and the guard ends what is
left and removes its shared memory (vLLM's ring buffers are 160 MiB each) and its folder of sockets
and temporary files. It runs without site packages, so this file imports nothing else but host/
(psutil when watching).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sfpo_megatron.host.processes import TIDIES_UP, ProcessIdentity, tidies_up
from sfpo_megatron.host.scratch import is_scratch, note_segment, remove_tree
from sfpo_megatron.host.temporary import own_folder

# Of Python, of vLLM's tensor parallelism on CPU, of NCCL: what a killed process leaves.
_SEGMENTS = tuple(f"/dev/shm/{name}" for name in ("psm_", "sem.mp-", "vllm_dist_", "nccl-"))
_KEEPERS_S = 2.0
_ROOT = str(Path(__file__).resolve().parents[2])
_GUARD = f"import sys; sys.path.insert(0, sys.argv[1]); from {__name__} import main; main()"


class ActorProcesses(NamedTuple):
    """What has to be gone when an actor is closed."""

    members: tuple[ProcessIdentity, ...]
    """The actor and every descendant seen that is alive."""
    guard: ProcessIdentity | None
    """Ends by itself, last: it must not be killed before it has tidied up."""


class Lifeline:
    """Held by an actor for its whole life, and by rank 0 for a Ray cluster of its own."""

    def __init__(self, *, watch: bool = True) -> None:
        """`watch`: look for new children every second, in a thread, and have a folder of one's own
        for temporary files; else look only when asked, and use the folder that there is."""
        self._scratch = own_folder() if watch else None
        self._known: set[ProcessIdentity] = set()
        self._told: set[str] = set()
        self._noted: set[str] = set()
        self._lock = threading.Lock()
        started = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _GUARD, _ROOT, TIDIES_UP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert started.stdin is not None and started.stdout is not None
        self._pipe = started.stdin
        self._guard = ProcessIdentity.of(int(started.stdout.readline()))
        started.stdout.close()
        started.wait()
        self._folder = tempfile.gettempdir()
        if is_scratch(self._folder):
            self._tell({f"folder {self._folder}\n"})
        if watch:
            threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def processes(self) -> ActorProcesses:
        """The actor's processes as of now."""
        self.update_guard()
        own = ProcessIdentity.of(os.getpid())
        assert own is not None
        return ActorProcesses((own, *sorted(self._known)), self._guard)

    def _watch(self) -> None:
        # EngineCore's own children appear over its first half minute.
        while True:
            self.update_guard()
            time.sleep(1.0)

    def close(self) -> None:
        """End the guard: whatever it was to end has ended."""
        with self._lock:
            self._tell({"done\n"})
            self._pipe.close()

    def update_guard(self) -> None:
        """Name to the guard the children and segments that are new."""
        with self._lock:
            self._update_guard_locked()

    def _update_guard_locked(self) -> None:
        import psutil

        children = psutil.Process().children(recursive=True)
        found = {ProcessIdentity.of(child.pid) for child in children}
        # The dead are forgotten: programs of tools come and go, and their pids are given to others.
        alive = {identity for identity in self._known if identity.alive}
        self._known = alive | {identity for identity in found if identity is not None}
        lines = {f"process {identity.pid} {identity.start_ticks}\n" for identity in self._known}
        pids = (os.getpid(), *(identity.pid for identity in self._known))
        segments = {path for pid in pids for path in shared_memory(pid)}
        lines |= {f"shared_memory {path}\n" for path in segments}
        self._tell(lines)
        self._told &= lines
        for path in segments - self._noted:  # for the next run, if the guard is killed as well
            self._noted.add(path)
            if self._scratch is not None:
                note_segment(Path(path), self._scratch.path)

    def _tell(self, lines: set[str]) -> None:
        if news := lines - self._told:
            self._told |= news
            self._pipe.write("".join(sorted(news)).encode())
            self._pipe.flush()


def shared_memory(pid: int) -> set[str]:
    """Shared-memory segments and named semaphores, of those kinds, that a process has mapped."""
    try:
        with open(f"/proc/{pid}/maps") as stream:
            paths = (line.split(maxsplit=5)[-1].strip() for line in stream)
            return {path for path in paths if path.startswith(_SEGMENTS)}
    except OSError:
        return set()


def guard() -> None:
    """Wait for the end of standard input, then end and remove what was named on it."""
    *whole, _ = sys.stdin.buffer.read().decode().split("\n")  # whoever is killed may leave half one
    lines = [line.split(" ", 1) for line in whole]
    if ["done"] in lines:
        return
    named = [value.split() for kind, value in lines if kind == "process"]
    processes = [ProcessIdentity(int(pid), int(start_ticks)) for pid, start_ticks in named]
    # Python's own keepers of shared memory know what nobody had the time to name here.
    keepers = [process for process in processes if tidies_up(process.pid)]
    for process in processes:
        if process not in keepers:
            process.kill()
    end = time.monotonic() + _KEEPERS_S
    while any(keeper.alive for keeper in keepers) and time.monotonic() < end:
        time.sleep(0.02)
    for keeper in keepers:
        keeper.kill()
    for kind, value in lines:
        if kind == "shared_memory":
            Path(value).unlink(missing_ok=True)  # its owner, or its keeper, was first
        elif kind == "folder":
            remove_tree(value)


def main() -> None:
    """Say the guard's pid and be it, as nobody's child: Ray kills an actor's children with it."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    with suppress(BrokenPipeError):  # it is needed all the more if whoever asked is gone by now
        os.write(1, f"{os.getpid()}\n".encode())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    guard()
