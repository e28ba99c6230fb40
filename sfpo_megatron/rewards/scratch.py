"""Directories for the temporary files of scoring processes.

Each is locked while its owner lives. What a killed run leaves behind is unlocked, and the next pool
on the machine removes it. Process ids would not tell: containers share /tmp, not their ids.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "sfpo-scoring-"


class Scratch:
    """A directory of its own, until `remove` or the end of this process."""

    def __init__(self) -> None:
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            lock = _locked(self.path)
            if lock is not None and os.path.isdir(self.path):
                self._lock = lock
                return
            if lock is not None:  # removed by `remove_abandoned` of another process just now
                os.close(lock)

    def remove(self) -> None:
        """Remove it with what is in it. Once only."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove those of this user whose owners were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
        except OSError:  # gone meanwhile
            continue
        lock = _locked(str(path))
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(path: str) -> int | None:
    """A descriptor that holds the directory's lock; None if another one does, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
