"""Whether there is a terminal that takes a line in place, and what other processes owe that line.

One process, trainer rank 0, redraws the last line of the terminal (tracking/live.py). The others
write whole lines that wipe it first, and whoever survives a process that was killed in the middle
gives the terminal back. Standard library only.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

WIPE = "\r\x1b[K"
"""Back to the start of the line, and nothing is on it."""
_SHOW_CURSOR = "\x1b[?25h"


def takes_line_in_place(stream: TextIO) -> bool:
    """Whether a line of `stream` can be redrawn: a terminal, and nobody has asked for plain text
    (NO_COLOR, TERM=dumb)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    try:
        return stream.isatty()
    except ValueError:  # it is closed
        return False


def give_back(stream: TextIO) -> None:
    """Wipe the line that a process may have left half drawn, and show the cursor."""
    if takes_line_in_place(stream):
        with suppress(OSError):  # the terminal may be gone
            stream.write(WIPE + _SHOW_CURSOR)
            stream.flush()


def announce(text: str, stream: TextIO) -> None:
    """A line that stands until another process draws its own there; nothing on what is no
    terminal."""
    if takes_line_in_place(stream):
        with suppress(OSError):
            stream.write(WIPE + text + "\r")
            stream.flush()


def wipe_before_writing() -> None:
    """Have this process write whole lines from now on, each in the place of the line that another
    process redraws."""
    if takes_line_in_place(sys.stdout):
        sys.stdout = WipingStream(sys.stdout)
        if takes_line_in_place(sys.stderr):
            sys.stderr = WipingStream(sys.stderr)


class WipingStream(io.TextIOWrapper):
    """Writes where another stream does, line by line, each after a WIPE."""

    def __init__(self, stream: TextIO) -> None:
        self._begun = ""
        stream.flush()
        # With a buffer of its own: that of the other stream would be closed with this one.
        buffer = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115
        super().__init__(buffer, stream.encoding, stream.errors)

    def write(self, text: str) -> int:
        """Write the lines that `text` ends, and keep what it begins."""
        *whole, self._begun = (self._begun + text).split("\n")
        if whole:
            super().write("".join(f"{WIPE}{line}\n" for line in whole))
            super().flush()
        return len(text)

    def flush(self) -> None:
        """Write also a line that has not ended."""
        if self._begun:
            begun, self._begun = self._begun, ""
            super().write(f"{WIPE}{begun}\n")
        super().flush()


def keep_stdout() -> TextIO:
    """What stdout is now, for the caller alone: whatever else this process and those that it starts
    write there, goes to stderr from now on."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")
