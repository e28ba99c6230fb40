"""Rows of a parquet file (columns.py), read with pyarrow, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import row_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row

_BATCH_ROWS = 1024


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """The problems of `source.path`, numbered from 1."""
    path = source.path or ""
    if not Path(path).is_file():
        raise SourceError(
            "path", found=shorten(path), expected="a parquet file", fix="correct the path"
        )
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SourceError(
            "source",
            found="parquet, and no pyarrow in this Python",
            expected="pyarrow to read it",
            fix="pip install pyarrow, or convert the file to jsonl",
        ) from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)
        records = (record for batch in batches for record in batch.to_pylist())
        for number, record in enumerate(records, start=1):
            yield row_of(record, where=f"{path}:{number}", row_id=str(number))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise SourceError(
            "path",
            found=f"{shorten(path)} ({shorten(str(error))})",
            expected="a readable parquet file",
            fix="download it again",
        ) from error
