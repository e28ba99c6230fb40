"""Rows of a jsonl file: one object a line (columns.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.data.columns import SHAPE, row_of
from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row


def jsonl_rows(path: str, *, size: int | None, key: str, name: str) -> Iterator[Row | DataError]:
    """The first `size` problems of `path` (null: all). Blank lines are no rows. `key` names the
    source in messages about the file."""
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"{key}.path", found=shorten(path), expected="a jsonl file", fix="correct the path"
        )
    taken = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if size is not None and taken == size:
                return
            if line.strip():
                row = _row(line, where=f"{path}:{number}", row_id=f"{name}/{number}")
                taken += isinstance(row, Row)
                yield row


def _row(line: bytes, *, where: str, row_id: str) -> Row | DataError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, both ValueErrors
        found = f"{shorten(line.decode(errors='replace').strip(), 60)} ({error})"
        return DataError(where, found=found, expected=SHAPE, fix="correct or remove the line")
    return row_of(value, where=where, row_id=row_id)
