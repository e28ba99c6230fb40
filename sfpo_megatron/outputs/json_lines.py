"""Files of JSON lines that a run writes, read back: metrics, samples, starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
