"""Ends an actor's child processes when the actor is gone, however it went.

vLLM's EngineCore outlives a parent that is killed with SIGKILL (its workers do watch EngineCore,
EngineCore watches nobody). The guard is a small process of its own session that reads the children's
identities from a pipe; the pipe closes when the actor ends, and the guard ends what is left and
removes the shared memory of those it had to end (vLLM's ring buffers are 160 MiB each).
Run as a script by path, so this file imports the standard library only (psutil when watching).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple


class ProcessIdentity(NamedTuple):
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessIdentity | None:
        """None for a process that is gone, or dead and not yet waited for."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as stream:
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else ProcessIdentity(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return ProcessIdentity.of(self.pid) == self

    def shared_memory(self) -> set[str]:
        """Python shared-memory segments that it has mapped."""
        try:
            with open(f"/proc/{self.pid}/maps") as stream:
                paths = (line.split(maxsplit=5)[-1].strip() for line in stream)
                return {path for path in paths if path.startswith("/dev/shm/psm_")}
        except OSError:
            return set()

    def kill(self) -> None:
        if self.alive:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


class ActorProcesses(NamedTuple):
    """What has to be gone when an actor is closed."""

    members: tuple[ProcessIdentity, ...]
    """The actor and every descendant seen so far."""
    guard: ProcessIdentity | None
    """Ends by itself, last: it must not be killed before it has tidied up."""


class Lifeline:
    """Held by an actor for its whole life."""

    def __init__(self) -> None:
        self._known: set[ProcessIdentity] = set()
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-E", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def processes(self) -> ActorProcesses:
        """As of now."""
        self._tell_news()
        own = ProcessIdentity.of(os.getpid())
        assert own is not None
        return ActorProcesses((own, *sorted(self._known)), ProcessIdentity.of(self._guard.pid))

    def _watch(self) -> None:
        # EngineCore's own children appear over its first half minute.
        while self._guard.poll() is None:
            self._tell_news()
            time.sleep(1.0)

    def _tell_news(self) -> None:
        with self._lock:
            self._tell_news_locked()

    def _tell_news_locked(self) -> None:
        import psutil

        children = psutil.Process().children(recursive=True)
        found = {ProcessIdentity.of(c.pid) for c in children if c.pid != self._guard.pid}
        self._known |= {identity for identity in found if identity is not None}
        lines = {f"process {identity.pid} {identity.start_ticks}\n" for identity in self._known}
        segments = {path for identity in self._known for path in identity.shared_memory()}
        lines |= {f"shared_memory {path}\n" for path in segments}
        if news := lines - self._told:
            self._told |= news
            assert self._guard.stdin is not None
            self._guard.stdin.write("".join(sorted(news)).encode())
            self._guard.stdin.flush()


def guard() -> None:
    """Wait for the end of standard input, then end and remove what was named on it."""
    lines = [line.decode().split() for line in sys.stdin.buffer]
    for kind, *values in lines:
        if kind == "process":
            ProcessIdentity(int(values[0]), int(values[1])).kill()
    for kind, *values in lines:
        if kind == "shared_memory" and os.path.exists(values[0]):
            os.unlink(values[0])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard()
