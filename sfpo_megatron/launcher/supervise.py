"""Two processes for each command that starts others, so that every end of it is a whole one.

The one in front is the user's: it takes the signals, holds nothing but the standard library, and
waits. The other, its fork in a session of its own, does the work. Whichever is killed, the other
ends all that is left and removes the folder of temporary files. The first Ctrl-C is passed on
once; more of them, at whatever moment, change nothing. What has not ended by itself after
`LIMIT_S` is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from sfpo_megatron.host.processes import (
    adopt_orphans,
    end_descendants,
    end_with_parent,
    send_signal,
)
from sfpo_megatron.host.scratch import remove_tree
from sfpo_megatron.host.temporary import NoTemporaryFolder, temporary_folder
from sfpo_megatron.outputs.stopping import STOPPED_EXIT_CODE

LIMIT_S = 22.0  # above what closing takes (launch.SHUTDOWN_TIMEOUT_S and more), below 30 s in all
_POLL_S = 0.05
Ask = Callable[[signal.Signals], bool]
"""Asks the run to save and end; False where it cannot hear of that."""
_ASKING = (signal.SIGTERM, signal.SIGUSR1)
_SIGNALS = (*_ASKING, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def supervise(work: Callable[[], int], *, ask: Ask | None = None) -> int:
    """Call `work` in a process of its own; its exit code, or 128 + N where signal N has ended it;
    but for Ctrl-C, 0 and 85 stay. Whoever calls this ends with that code: no signal has an effect
    any more.

    `work` takes SIGINT, which it gets once, as the order to end. `ask`: what the first SIGTERM and
    each SIGUSR1 do instead, where it does not return False; without it they are orders as well.
    """
    front = _Front(ask)
    try:
        with temporary_folder():
            return front.wait_for(_fork(work))
    except NoTemporaryFolder as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _fork(work: Callable[[], int]) -> int:
    """Start the process of `work`; its pid. In that process, SystemExit with the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    # What the front passes on at once must not meet the front's own handler there.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    os.setsid()  # a terminal sends its signals to the front alone
    end_with_parent(signal.SIGINT)
    for signum in _SIGNALS:  # a job's end sends SIGTERM to all processes: the front has it as well
        signal.signal(signum, _nothing)
    signal.signal(signal.SIGINT, _leave)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if os.getppid() != parent:  # it was killed before the kernel knew what to send
        os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(_work(work))


def _work(work: Callable[[], int]) -> int:
    adopt_orphans()  # what a killed rank leaves behind (Ray, vLLM) is this process's to end
    try:
        return work()
    finally:
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        end_descendants()


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which all that is started from here would inherit."""


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    """The end before `work` has a handler of its own: nothing has been started. Not by an
    exception, which an import might swallow."""
    remove_tree(os.environ["TMPDIR"])
    os._exit(128 + signum)


class _Front:
    """What the process in front knows: who ordered the end, and when."""

    def __init__(self, ask: Ask | None) -> None:
        """Take the signals: none interrupts this process any more."""
        self._ask = ask
        self._asking = set(_ASKING) if ask else set()
        self._new: list[signal.Signals] = []
        self._ended_by: signal.Signals | None = None
        self._deadline = float("inf")
        for signum in _SIGNALS:  # SIGUSR1 too: its default would end this process without a word
            # nohup ignores hangups; Ctrl-C counts also where a shell has put us in the background.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, lambda number, _: self._new.append(signal.Signals(number)))

    def wait_for(self, pid: int) -> int:
        """Wait for the process of `work`, end what it leaves, and return the exit code."""
        adopt_orphans()
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):  # no pidfd before Linux 5.3
            self._pass_on(pid)
            if time.monotonic() > self._deadline:
                end_descendants(grace_s=0.0)
            time.sleep(_POLL_S)
        end_descendants()  # only what a killed process has left
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        late = [signum for signum in self._new if signum not in self._asking]
        self._ended_by = next(filter(None, [self._ended_by, *late]), None)
        return self._exit_code(os.waitstatus_to_exitcode(status[1]), pid)

    def _pass_on(self, pid: int) -> None:
        while self._new:
            signum = self._new.pop(0)
            if self._ended_by is not None:
                continue  # the end is under way
            if self._ask and signum in self._asking:
                if signum == signal.SIGTERM:
                    self._asking = {signal.SIGUSR1}  # a second one is no request
                if self._ask(signum):
                    continue  # else nothing could be saved there either
            self._ended_by = signum
            self._deadline = time.monotonic() + LIMIT_S
            send_signal(pid, signal.SIGINT)

    def _exit_code(self, code: int, pid: int) -> int:
        """The exit code of the command; one line where `work` has had no occasion to say why."""
        by = self._ended_by
        if code < 0 and by is None:
            name = signal.Signals(-code).name
            _say(f"error: pid {pid}, which led the run, was killed by {name}")
            return 1
        if by is None or (code in (0, STOPPED_EXIT_CODE) and by != signal.SIGINT):
            return code  # it had got to its end, or saved: a job script goes by that
        if code < 0 or code == 128 + signal.SIGINT:
            _say(f"error: stopped by {by.name}")
        return 128 + by


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(line, file=sys.stderr, flush=True)
