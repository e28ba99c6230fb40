"""Rows of a jsonl file: one object a line (columns.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import SHAPE, row_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """The problems of `source.path`, numbered by their lines. Blank lines are no rows."""
    path = source.path or ""
    if not Path(path).is_file():
        raise SourceError(
            "path", found=shorten(path), expected="a jsonl file", fix="correct the path"
        )
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(line, where=f"{path}:{number}", row_id=str(number))


def _row(line: bytes, *, where: str, row_id: str) -> Row | DataError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, both ValueErrors
        found = f"{shorten(line.decode(errors='replace').strip(), 60)} ({error})"
        return DataError(where, found=found, expected=SHAPE, fix="correct or remove the line")
    return row_of(value, where=where, row_id=row_id)
