"""Rows of jsonl files, packed with gzip or not: one object a line (columns.py)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from sfpo_megatron.config.source_files import text_of
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import SHAPE, row_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.several import numbered_files
from sfpo_megatron.data.values import written_float

_DECODER = json.JSONDecoder(parse_float=written_float)
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_NO_LINES = {
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"version https://git-lfs": "a git-lfs pointer, not the file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""First bytes of files that have no lines of JSON in UTF-8 -> what they are."""


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """The problems of `source.path`, numbered by their lines. Blank lines are no rows."""
    for file, prefix in numbered_files(source):
        try:
            for number, line in enumerate(_lines(file), start=1):
                if line.removeprefix(_BOM).strip():
                    row_id = f"{prefix}{number}"
                    yield _row(line, f"{file}:{number}", row_id, source.columns)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(
                "path",
                found=f"{str(file)!r} ({shorten(str(error))})",
                expected="a jsonl file that can be read to its end",
                fix="download it again, or correct its permissions",
            ) from error


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as plain:
        head = plain.read(max(map(len, _NO_LINES)))
    what = next((what for first, what in _NO_LINES.items() if head.startswith(first)), None)
    if what is not None:
        raise SourceError(
            "path",
            found=f"{str(file)!r}, {what}",
            expected="lines of JSON in UTF-8, plain or packed with gzip",
            fix="convert or unpack it, or name the source that reads it",
        )
    with gzip.open(file) if head.startswith(_GZIP) else file.open("rb") as lines:
        yield from lines


def _row(line: bytes, where: str, row_id: str, columns: Mapping[str, str]) -> Row | DataError:
    try:
        value = _DECODER.decode(text_of(line))
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, both ValueErrors
        found = f"{shorten(line.decode(errors='replace').strip(), 60)} ({error})"
        fix = "correct or remove the line"
        return DataError(where, found=found, expected=SHAPE, fix=fix, kind="not JSON")
    return row_of(value, where=where, row_id=row_id, columns=columns)
