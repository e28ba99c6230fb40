"""Processes of this machine: who is alive, who descends from whom, who ends with whom.

Linux: read from /proc. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# What these processes are for begins when others have ended: the guard of an actor, which carries
# this word in its command line, and Python's own keeper of shared memory.
TIDIES_UP = "sfpo-guard"
_TIDYING = (TIDIES_UP.encode(), b"multiprocessing.resource_tracker")
LEFTOVER_GRACE_S = 3.0
_KILLING_S = 2.0
_TIDYING_S = 3.0
_POLL_S = 0.05


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


def tidies_up(pid: int) -> bool:
    """Whether a process is to end by itself, after those that it tidies up behind."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            command = stream.read()
    except OSError:
        return False
    return any(sign in command for sign in _TIDYING)


def end_descendants(grace_s: float = LEFTOVER_GRACE_S) -> None:
    """End every process below this one, by SIGTERM and after `grace_s` by SIGKILL; then those that
    tidy up behind them, which have seconds of their own for it."""
    own = os.getpid()
    found = descendants(own)
    if not found:
        return
    if grace_s > 0.0:
        for pid in found:
            if not tidies_up(pid):
                send_signal(pid, signal.SIGTERM)
        _wait_for_end(lambda: any(not tidies_up(pid) for pid in descendants(own)), grace_s)
    end = time.monotonic() + _KILLING_S  # some may start more; one in the kernel's hands stays
    while time.monotonic() < end:
        others = [pid for pid in descendants(own) if not tidies_up(pid)]
        if not others:
            break
        for pid in others:
            send_signal(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    _wait_for_end(lambda: bool(descendants(own)), _TIDYING_S)
    for pid in descendants(own):
        send_signal(pid, signal.SIGKILL)


def _wait_for_end(goes_on: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while goes_on() and time.monotonic() < end:
        time.sleep(_POLL_S)


def end_with_parent(signum: signal.Signals) -> None:
    """The kernel sends `signum` to this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """What a killed child leaves behind becomes a child of this process, which can end it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
