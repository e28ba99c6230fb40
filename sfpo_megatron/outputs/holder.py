"""Who has a run's directory, as RUN/.lock says it. Standard library only."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sfpo_megatron.host.processes import ProcessIdentity
from sfpo_megatron.outputs.directory import RunDirectory

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = bytes(1 << 16)  # about what the logs and the config of a run take before its first step


@dataclass(kw_only=True, frozen=True, slots=True)
class Holder:
    """Who has a run's directory, or had it last."""

    host: str
    pid: int
    start_ticks: int
    command: str
    started: str
    run: str
    """The same in all processes of one run."""

    @staticmethod
    def this_process(run: str) -> Holder:
        own = ProcessIdentity.of(os.getpid())
        return Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            start_ticks=own.start_ticks if own else 0,
            command=" ".join(sys.orig_argv[1:]),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            run=run,
        )

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; what other hosts run is not known."""
        return self.is_here and not ProcessIdentity(self.pid, self.start_ticks).alive

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Holder | None:
        """None for a file that is empty, half written or somebody else's."""
        try:
            found = json.loads(text)
            holder = Holder(**{field.name: found[field.name] for field in fields(Holder)})
        except (ValueError, TypeError, KeyError):
            return None
        return holder if isinstance(holder.pid, int) else None

    @staticmethod
    def read(path: Path) -> Holder | None:
        """What `path` says; None also where there is no such file."""
        try:
            return Holder.from_json(path.read_bytes())
        except OSError:
            return None


class DirectoryRefused(RuntimeError):
    """A run cannot have its directory: one line that says why and what to do."""


class DirectoryNotWritable(DirectoryRefused):
    """The file system does not let this user write there."""

    def __init__(self, directory: RunDirectory, error: OSError) -> None:
        expected, fix = "a folder that can", "choose another output_dir"
        if error.errno in _FULL:
            expected, fix = "room for them", f"free some space there, or {fix}"
        elif error.errno in (errno.EACCES, errno.EPERM):
            fix += " or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            fix += " or move the file away"
        super().__init__(
            f"output_dir: found {directory.path}, where {error.filename or 'files'} cannot be "
            f"written ({error.strerror}), expected {expected}; {fix}"
        )


def require_writable(directory: RunDirectory) -> None:
    """Make the directory, and write a file there as a run's first ones will be written;
    DirectoryNotWritable where that fails: a full disk shows only so."""
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory.path, buffering=0) as probe:
            left = len(_PROBE)
            while left:
                left -= probe.write(_PROBE[:left])
            os.fsync(probe.fileno())
    except OSError as error:
        raise DirectoryNotWritable(directory, error) from error


class RunInUse(DirectoryRefused):
    """Another run has the directory; one line that names it and what to do."""

    def __init__(self, directory: RunDirectory, holder: Holder | None) -> None:
        who, stop = "a process that has not said who it is", "stop it"
        if holder is not None:
            who = f"pid {holder.pid} on {holder.host}, {holder.command!r}, since {holder.started}"
            stop = f"stop it with `kill {holder.pid}` on {holder.host}"
        super().__init__(
            f"output_dir: found another run in {directory.path} ({who}), expected none; wait for "
            f"its end, {stop}, or set another output_dir"
        )
