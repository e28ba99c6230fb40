"""Directories for temporary files that end with what made them.

Each has a marker file and is locked while a process that owns it lives: its maker, and those that
the maker forks. What a killed run leaves behind is unlocked, and the next one on the machine
removes it. Process ids would not tell: containers share /tmp, not their ids. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_MARKER = ".sfpo-scratch"
_SEGMENTS = ".sfpo-segments"
SHARED_MEMORY = Path("/dev/shm")
_TRIES = 5
_BETWEEN_TRIES_S = 0.1


class Scratch:
    """A directory of its own, for this user only, until `remove` or the end of this process."""

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        """In `parent`, or where temporary files are now."""
        while True:
            self.path = tempfile.mkdtemp(prefix=prefix, dir=parent)
            lock = _locked(self.path)
            if lock is not None and os.path.isdir(self.path):
                self._lock = lock
                Path(self.path, _MARKER).touch()
                return
            if lock is not None:  # removed by `remove_abandoned` of another process just now
                os.close(lock)

    def remove(self) -> None:
        """Remove it with what is in it and what was noted in it. Once only."""
        remove_tree(self.path)
        os.close(self._lock)


def is_scratch(directory: str) -> bool:
    """Whether it is such a directory."""
    return os.path.isfile(os.path.join(directory, _MARKER))


def note_segment(path: Path, directory: str | None = None) -> None:
    """Remove a file of /dev/shm together with `directory`, whoever does it; without one, with the
    folder of this process's temporary files, if it goes with the run."""
    directory = directory or tempfile.gettempdir()
    if not is_scratch(directory):
        return
    with open(os.path.join(directory, _SEGMENTS), "a", encoding="utf-8") as stream:
        stream.write(f"{path}\n")


def remove_tree(directory: str) -> None:
    """Remove a directory, and the shared memory that is noted in it or in one below. What cannot
    be removed now keeps the marker, so that the next run on the machine removes it."""
    # Not rglob, which raises where a folder goes while it looks: others may remove this one too.
    for folder, _, names in os.walk(directory):
        if _SEGMENTS not in names:
            continue
        try:
            noted = Path(folder, _SEGMENTS).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for path in map(Path, noted):
            if path.parent == SHARED_MEMORY:
                path.unlink(missing_ok=True)
    for _ in range(_TRIES):
        if _removed(directory):
            return
        time.sleep(_BETWEEN_TRIES_S)


def _removed(directory: str) -> bool:
    """Try to remove it, its marker last; False if it is still there: a process that is ending has
    made a file meanwhile, as Ray's do for their logs."""
    marker = os.path.join(directory, _MARKER)
    with suppress(OSError):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if path == marker:
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        if not set(os.listdir(directory)) - {_MARKER}:
            Path(marker).unlink(missing_ok=True)
            os.rmdir(directory)
    if not os.path.isdir(directory):
        return True
    with suppress(OSError):
        Path(marker).touch()
    return False


def remove_abandoned(prefix: str, parent: str | None = None) -> None:
    """Remove those of this user whose owners were killed."""
    for path in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            if not (path / _MARKER).is_file():
                continue  # another's name, or being made just now
        except OSError:  # gone meanwhile
            continue
        lock = _locked(str(path))
        if lock is not None:
            remove_tree(str(path))
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
