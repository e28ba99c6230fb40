"""Processes of this machine: who is alive, who descends from whom, who ends with whom.

Linux: read from /proc. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _Stat(NamedTuple):
    """What is used of /proc/PID/stat."""

    state: str
    parent: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """False for a process that has ended and was not waited for."""
        return self.state not in ("Z", "X")


def _stat(pid: int) -> _Stat | None:
    """None for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            # After the name, which may hold blanks and parentheses.
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


class ProcessIdentity(NamedTuple):
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessIdentity | None:
        """None for a process that is gone, or dead and not yet waited for."""
        stat = _stat(pid)
        return ProcessIdentity(pid, stat.start_ticks) if stat and stat.is_alive else None

    @property
    def alive(self) -> bool:
        return ProcessIdentity.of(self.pid) == self

    def kill(self) -> None:
        if self.alive:
            send_signal(self.pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether `pid` runs; a process that only waits to be reaped does not."""
    return ProcessIdentity.of(pid) is not None


def descendants(root: int) -> list[int]:
    """Live processes below `root`, those below dead ones included."""
    children: dict[int, list[int]] = {}
    alive: set[int] = set()
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        if stat := _stat(pid):  # else it ended while we were reading
            children.setdefault(stat.parent, []).append(pid)
            if stat.is_alive:
                alive.add(pid)
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += [pid for pid in below if pid in alive]
        todo += below
    return found


def send_signal(pid: int, signum: signal.Signals) -> None:
    """Signal a process that may be gone."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


def end_with_parent(signum: signal.Signals) -> None:
    """The kernel sends `signum` to this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """What a killed child leaves behind becomes a child of this process, which can end it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
