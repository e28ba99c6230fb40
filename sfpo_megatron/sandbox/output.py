"""What limited processes print: the end of it for messages, the rest into a log with a limit."""

from __future__ import annotations

import logging
import os
from pathlib import Path

LIMIT_BYTES = 64 << 20
_TAIL_BYTES = 2000

log = logging.getLogger(__name__)


class OutputLog:
    """The log of one such process and of those that replace it. Nothing that happens to the log
    harms them: past its limit, or on a full disk, their output is dropped."""

    def __init__(self, path: Path | None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        """`path`: appended to, and made with the first output; None for this process's stderr."""
        self._path = path
        self._room = limit_bytes
        self._limit_bytes = limit_bytes
        self._descriptor = 2 if path is None else -1
        self._tail = b""

    def write(self, data: bytes) -> None:
        """Append."""
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._room <= 0:
            return
        kept = data[: self._room]
        self._room -= len(kept)
        if self._room <= 0:
            kept += b"\n[%d bytes of output: what follows is dropped]\n" % self._limit_bytes
        try:
            if self._descriptor < 0 and self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o644)
            while kept:
                kept = kept[os.write(self._descriptor, kept) :]
        except OSError as error:
            self._room = 0
            log.warning("%s: output of the processes is dropped (%s)", self.name, error)

    @property
    def name(self) -> str:
        """Path of the log, or stderr."""
        return "stderr" if self._path is None else str(self._path)

    @property
    def tail(self) -> str:
        """The last of it."""
        return self._tail.decode(errors="replace").strip()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._descriptor > 2:
            os.close(self._descriptor)
            self._descriptor = -1
