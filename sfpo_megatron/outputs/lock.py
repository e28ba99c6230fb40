"""One run at a time in an output directory: RUN/.lock, held by `train` and `sft` from before
anything is written there to the end. `eval`, `check` and the tools only read and take none.

The lock is flock(2), which the kernel lets go with the last descriptor: a run that is killed leaves
no obstacle. A POSIX record lock (`fcntl.lockf`) would not reach forked children, but it ends as
soon as the process closes any descriptor of the file, such as that of a copy of RUN. flock's is
shared by children instead: programs that are started (Ray, vLLM) do not get it, as Python opens
files with O_CLOEXEC, and forks (checkpoint writers) close it first thing.

A run may have several holders: the launcher, so that a second start ends before it has touched
anything, and rank 0, which may live on for seconds when the launcher is killed. The first takes the
lock alone, writes into the file who it is, and then shares it with those that name the same `run`.

Where flock is not to be had, heartbeat.py takes its place. Standard library only.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from types import TracebackType

from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.heartbeat import Heartbeat
from sfpo_megatron.outputs.holder import DirectoryNotWritable, Holder, RunInUse, require_writable

PATIENCE_S = 1.0
"""How long a lock that is taken is tried again: others look at it for an instant."""
CLOSING_S = 20.0
"""The same where its first holder is dead on this host: what it started is about to end too."""
_POLL_S = 0.05

log = logging.getLogger(__name__)


def has(directory: RunDirectory, run: str) -> bool:
    """Whether `run` has the directory, or was the last to have it."""
    holder = Holder.read(directory.lock)
    return holder is not None and holder.run == run


def is_anothers(directory: RunDirectory, run: str) -> bool:
    """Whether another than `run` has the directory, or was the last to have it."""
    holder = Holder.read(directory.lock)
    return holder is not None and holder.run != run


class RunLock:
    """Holds the directory of a run while it is entered; makes it. DirectoryRefused if another run
    has it, or if it cannot be written."""

    def __init__(self, directory: RunDirectory, *, run: str) -> None:
        """`run`: the same for all processes that are to share the lock, and for no other."""
        self._directory = directory
        self._own = Holder.this_process(run)
        self._release: Callable[[], None] = _nothing

    def __enter__(self) -> RunLock:
        require_writable(self._directory)
        try:
            try:
                self._take()
            except _NoFlock as error:
                self._take_heartbeat(error)
        except OSError as error:
            raise DirectoryNotWritable(self._directory, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        release, self._release = self._release, _nothing
        if os.getpid() == self._own.pid:
            release()

    def _take(self) -> None:
        begun = time.monotonic()
        while (descriptor := self._try()) is None:
            holder = Holder.read(self._directory.lock)
            is_closing = holder is not None and holder.is_gone
            if time.monotonic() > begun + (CLOSING_S if is_closing else PATIENCE_S):
                raise RunInUse(self._directory, holder)
            time.sleep(_POLL_S)
        _held.add(descriptor)
        self._release = lambda: _close(descriptor)

    def _try(self) -> int | None:
        """A descriptor that holds the lock, or None."""
        descriptor = os.open(self._directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if _flock(descriptor, fcntl.LOCK_EX):
                if self._is_file(descriptor):
                    self._sign(descriptor)
                    # Not in one motion: another may get in between, and then has it alone.
                    if _flock(descriptor, fcntl.LOCK_SH):
                        return descriptor
            elif _flock(descriptor, fcntl.LOCK_SH) and has(self._directory, self._own.run):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _is_file(self, descriptor: int) -> bool:
        """Whether RUN/.lock is still what was opened: a user may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._directory.lock))
        except FileNotFoundError:
            return False

    def _sign(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self._own.to_json().encode(), 0)

    def _take_heartbeat(self, why: OSError) -> None:
        heartbeat = Heartbeat(self._directory, self._own)
        if heartbeat.take():
            log.warning(
                "%s: no flock on this file system (%s); a heartbeat in %s keeps other runs out",
                self._directory.lock,
                why.strerror,
                self._directory.heartbeat.name,
            )
            self._directory.lock.write_text(self._own.to_json(), encoding="utf-8")
        self._release = heartbeat.release


class _NoFlock(OSError):
    """This file system cannot flock."""


def _flock(descriptor: int, kind: int) -> bool:
    """Whether the lock was free; raises `_NoFlock` for whatever else an answer is: file systems
    say in many ways that they cannot (ENOTSUP, ENOLCK, EINVAL, ENOSYS, EIO)."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _NoFlock(*error.args) from error
    return True


# ---- descriptors that hold a lock ----------------------------------------------------------------

_held: set[int] = set()


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _close_all() -> None:
    for descriptor in tuple(_held):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_all)


def _nothing() -> None:
    """There is nothing to let go."""
