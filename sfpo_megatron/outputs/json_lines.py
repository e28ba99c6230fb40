"""Files of JSON lines that a run writes and that are read back: metrics, samples, starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class JsonLine(NamedTuple):
    """One line."""

    where: str
    """`FILE:LINE`."""
    text: bytes
    content: dict[str, Any]


def read_lines(
    path: str | Path, *, expected: str = "a JSON object", is_written: bool
) -> Iterator[JsonLine]:
    """The lines that are not blank. ValueError names one that is no object in UTF-8, and says what
    was `expected`. `is_written`: a run may be writing the file; half a line at its end is left
    out."""
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip() or (is_written and not text.endswith(b"\n")):
                continue
            where = f"{path}:{number}"
            try:
                content = json.loads(text.decode())
            except (ValueError, RecursionError) as error:
                raise bad_line(where, text, expected) from error
            if not isinstance(content, dict):
                raise bad_line(where, text, expected)
            yield JsonLine(where, text, content)


def bad_line(where: str, text: bytes, expected: str) -> ValueError:
    """The error of a line that is none of those a run writes."""
    found = text.decode(errors="replace").strip()[:80]
    return ValueError(
        f"{where}: found {found!r}, expected {expected}; remove the line (a killed run may leave "
        "half a line at the end)"
    )


class Lines:
    """A file of JSON lines, to which whole lines are appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not buffered: a line is one write, so that a reader who follows the file never sees half
        # of one, and nothing is held back that a later flush could add to a line cut short.
        self._file = path.open("ab", buffering=0)
        self._cut_half_line()

    def _cut_half_line(self) -> None:
        """What a kill has left would swallow the next line."""
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                self._file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one object. OSError: the file ends before it."""
        left = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        whole_lines = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:  # the disk is full: half a line would break the table at the end
            self._file.truncate(whole_lines)
            at = f"the line of step {line['step']}" if "step" in line else "this line"
            why = f"{error.strerror}; {self._path} ends before {at}"
            raise OSError(error.errno, why) from error

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
