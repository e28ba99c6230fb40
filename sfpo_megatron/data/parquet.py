"""Rows of a parquet file (columns.py), read with pyarrow, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.data.columns import row_of
from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row

_BATCH_ROWS = 1024


def parquet_rows(path: str, *, size: int | None, key: str, name: str) -> Iterator[Row | DataError]:
    """The first `size` problems of `path` (null: all). `key` names the source in messages about the
    file; a row is named by its number, from 1."""
    if not Path(path).is_file():
        raise DataError(
            f"{key}.path", found=shorten(path), expected="a parquet file", fix="correct the path"
        )
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{key}.source",
            found="parquet, and no pyarrow in this Python",
            expected="pyarrow to read it",
            fix="pip install pyarrow, or convert the file to jsonl",
        ) from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)
        records = (record for batch in batches for record in batch.to_pylist())
        taken = 0
        for number, record in enumerate(records, start=1):
            if size is not None and taken == size:
                return
            row = row_of(record, where=f"{path}:{number}", row_id=f"{name}/{number}")
            taken += isinstance(row, Row)
            yield row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{key}.path",
            found=f"{shorten(path)} ({shorten(str(error))})",
            expected="a readable parquet file",
            fix="download it again",
        ) from error
