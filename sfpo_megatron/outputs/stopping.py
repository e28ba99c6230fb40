"""Stop requests: a run that is asked to end saves first, and exits with a code that says so.

There is one channel, the file RUN/stop-requested. Signal handlers write it, on any rank and in the
launcher; so may a batch script (`touch`). Rank 0 asks for it at safe points: while it waits for
rollouts, between passes, after a train step. The end of a Slurm job counts as a request too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from sfpo_megatron.outputs.directory import RunDirectory

STOPPED_EXIT_CODE = 85
"""Exit code of a run that saved and can be resumed; Slurm's RequeueExit understands it."""
JOB_END = "SLURM_JOB_END_TIME"
_unwritten: dict[Path, tuple[str, float]] = {}
"""Stop file that could not be written -> who has asked this process, and when (seconds since the
epoch): rank 0 hears of it all the same."""


class StopRequested(Exception):
    """There is nothing to wait for: the run was asked to stop before its first train step."""


class RunEnded(Exception):
    """The run has saved and ended itself, for a reason that the same command would meet again: a
    job that it is part of is not requeued. Exit code 1."""


class OutOfTime(Exception):
    """The train step cannot end within checkpoint.must_save_within_s of the stop request. Raised
    where a stop watch is looked at, on one rank."""


class StopRun(Exception):
    """Train step `step` is not made and the run ends; raised on every rank, outside of any
    collective. The message is the reason."""

    def __init__(self, reason: str, *, step: int, begun: bool) -> None:
        """`begun`: the step has changed weights already, so that only the last checkpoint is a
        state to come back to; else the state before the step is whole and can be saved."""
        super().__init__(reason)
        self.step, self.begun = step, begun


def request_on_signal(
    directory: RunDirectory,
    *signums: signal.Signals,
    is_ours: Callable[[], bool] = lambda: True,
) -> None:
    """Turn these signals to this process into stop requests to the run in `directory`.

    `is_ours`: whether that is the run of this process. If not, another run has the directory and
    must not hear of it: the signal ends this process.
    """

    def take(signum: int, frame: FrameType | None) -> None:
        if is_ours():
            asked = signal.Signals(signum)
            alone = "known to this rank alone: rank 0 saves and stops, another goes on"
            if not request(directory, asked, otherwise=alone):
                _unwritten.setdefault(directory.stop_file, (asked.name, time.time()))
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in signums:
        signal.signal(signum, take)


def request(
    directory: RunDirectory, signum: signal.Signals, *, otherwise: str = "not passed on"
) -> bool:
    """Ask the run in `directory` to stop; the first who asks is named. False where that cannot be
    written, and a line says so, and what the signal is `otherwise`: raised in a signal handler, the
    error would end what goes on."""
    file = directory.stop_file
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{signum.name}\n", encoding="utf-8")
        return True
    except OSError as error:
        if os.path.exists(file):  # on a full disk, and enough
            return True
        with suppress(OSError):  # not print: the handler may have interrupted one
            os.write(2, f"warning: {file}: {error}: {signum.name} is {otherwise}\n".encode())
        return False


def forget(directory: RunDirectory) -> None:
    """Drop the request that ended the run before this one."""
    directory.stop_file.unlink(missing_ok=True)
    _unwritten.pop(directory.stop_file, None)


class Stopping(Protocol):
    """Whether the run was asked to stop."""

    @property
    def reason(self) -> str | None:
        """Who asked, or None. Cheap: a look at one file."""

    def steps_begin(self) -> None:
        """Note that the first train step begins: until then a request ends the run at once, for
        there is nothing to save."""

    def saved(self, seconds: float) -> None:
        """Note how long a save has taken, all of it; so much of the time that is left the next one
        needs."""

    def check(self, remaining_s: float = 0.0) -> None:
        """Raise if there is no time for `remaining_s` more seconds of this train step and a save:
        StopRequested outside a train step, OutOfTime inside."""


class NoStop:
    """A run that saves nothing takes no requests, and other ranks leave them to rank 0."""

    reason: str | None = None

    def steps_begin(self) -> None:
        """A request is nobody's."""

    def saved(self, seconds: float) -> None:
        """There is no time to keep to."""

    def check(self, remaining_s: float = 0.0) -> None:
        """Nobody asks."""


class StopWatch:
    """Rank 0's view of the requests."""

    def __init__(
        self,
        directory: RunDirectory,
        *,
        must_save_within_s: float | None = None,
        stop_before_walltime_s: float | None = None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = directory.stop_file
        self._limit_s = must_save_within_s
        self._clock = clock
        self._since: float | None = None
        self._walltime: float | None = None
        self._has_steps = False
        self._save_s = 0.0
        if stop_before_walltime_s is not None and environ.get(JOB_END, "").isdigit():
            self._walltime = int(environ[JOB_END]) - stop_before_walltime_s

    @property
    def reason(self) -> str | None:
        """Who asked, or None. Cheap: a look at one file."""
        found = self._request() or _unwritten.get(self._file)
        if found is None and self._walltime is not None and self._clock() >= self._walltime:
            found = "the end of the Slurm job", self._walltime
        if found is None:
            return None
        who, when = found
        if self._since is None:
            self._since = min(self._clock(), when)
        return who

    def _request(self) -> tuple[str, float] | None:
        """Who asked by the file, and when."""
        try:
            when = self._file.stat().st_mtime
        except OSError:  # nobody, or the file system is away for a moment
            return None
        who = ""
        with suppress(OSError, UnicodeError):  # it may be one that only others can read
            who = self._file.read_text(encoding="utf-8").strip()
        return who or self._file.name, when

    def steps_begin(self) -> None:
        """Note that there is something to save from here on."""
        self._has_steps = True

    def saved(self, seconds: float) -> None:
        """Count so much for the next save."""
        self._save_s = seconds

    def check(self, remaining_s: float = 0.0) -> None:
        """Raise if there is no time for `remaining_s` more seconds of this train step and a save.

        StopRequested outside a train step, OutOfTime inside."""
        if self.reason is None:
            return
        if not self._has_steps:
            raise StopRequested(self.reason)
        if self._limit_s is None or self._since is None:
            return
        if self._clock() + remaining_s + self._save_s > self._since + self._limit_s:
            raise OutOfTime(self.reason)
