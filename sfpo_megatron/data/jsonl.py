"""Rows of jsonl files, packed with gzip or not: one object a line (columns.py)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

from sfpo_megatron.config.source_files import (
    LINES,
    NO_LINES_FIX,
    NoLines,
    is_blank,
    lines_in,
    text_of,
)
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import SHAPE, row_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.several import numbered_files
from sfpo_megatron.data.written_json import read_written


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """The problems of `source.path`, numbered by their lines. Blank lines are no rows."""
    for file, prefix in numbered_files(source):
        try:
            with file.open("rb") as opened:
                for number, line in enumerate(lines_in(opened), start=1):
                    if not is_blank(line):
                        row_id = f"{prefix}{number}"
                        yield _row(line, f"{file}:{number}", row_id, source.columns)
        except NoLines as error:
            raise SourceError(
                "path",
                found=f"{str(file)!r}, {error}",
                expected=LINES,
                fix=NO_LINES_FIX,
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(
                "path",
                found=f"{str(file)!r} ({shorten(str(error))})",
                expected="a jsonl file that can be read to its end",
                fix="download it again, or correct its permissions",
            ) from error


def _row(line: bytes, where: str, row_id: str, columns: Mapping[str, str]) -> Row | DataError:
    try:
        value = read_written(text_of(line))
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, both ValueErrors
        found = f"{shorten(line.decode(errors='replace').strip(), 60)} ({error})"
        fix = "correct or remove the line"
        return DataError(where, found=found, expected=SHAPE, fix=fix, kind="not JSON")
    return row_of(value, where=where, row_id=row_id, columns=columns)
