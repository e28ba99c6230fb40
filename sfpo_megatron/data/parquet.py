"""Rows of parquet files (columns.py), read with pyarrow, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.arrow import columns_of, rows_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.several import numbered_files

_BATCH_ROWS = 1024


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """The problems of `source.path`, numbered from 1 in each file."""
    files = list(numbered_files(source))
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
    for file, prefix in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                names, left_out = columns_of(opened.schema_arrow, source)
                batches = opened.iter_batches(batch_size=_BATCH_ROWS, columns=names)
                yield from rows_of(batches, source, left_out, str(file), prefix)
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceError(
                "path",
                found=f"{shorten(str(file))} ({shorten(str(error))})",
                expected="a readable parquet file",
                fix="download it again",
            ) from error
