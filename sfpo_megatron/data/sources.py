"""Reads a source, built in or a user's own: both are called alike and give rows or plain mappings.

A mapping has the columns that a line of a jsonl file has (columns.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import SHAPE, row_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.host.unwinding import failures
from sfpo_megatron.plugins import SOURCE, Foreign

MOST_ROWS = 1_000_000
"""Rows that a user's function may give without a `size`, or beside the good ones up to it: one
without end would be read for ever."""


def source_rows(source: DataSource, *, seed: int, key: str, name: str) -> Iterator[Row | DataError]:
    """The first `source.size` good rows (null: all), and the bad ones among them. `key` names the
    source in messages, `name` is the first part of its rows' ids. Raises DataError if the source
    itself cannot be read, or names a column that no good row has; PluginError if it cannot be
    loaded."""
    read = SOURCE.load(source.source, key=f"{key}.source")
    most = math.inf if source.source in SOURCE.built_in else MOST_ROWS
    taken = number = 0
    lacking = set(source.columns)
    try:
        for number, item in enumerate(read(source, seed), start=1):
            row = item
            if not isinstance(item, Row | DataError):
                where = f"{key} ({source.source} row {number})"
                row = _own_row(item, source, where=where, number=number)
            elif isinstance(item, Row) and source.path is None:
                row = replace(item, where=f"{key} ({item.where})")
            if isinstance(row, Row):
                taken += 1
                lacking.intersection_update(row.lacks)
                row = row.within(name, source.reward)
            yield row
            if taken == source.size:
                break
            if number - (taken if source.size else 0) > most:
                raise _endless(source, key, taken)
        if taken and lacking:
            raise _nowhere(source, min(lacking), taken)
    except SourceError as error:
        raise error.at(key) from error
    except DataError:
        raise
    except failures() as error:  # whatever a user's function raises
        what = "what it reads" if source.source in SOURCE.built_in else "the function"
        raise DataError(
            f"{key}.source",
            found=f"{source.source}, which raised {type(error).__name__}: {shorten(str(error))} "
            f"after {number} rows",
            expected="rows with a prompt and an answer",
            fix=f"correct {what}",
        ) from error


def _nowhere(source: DataSource, name: str, taken: int) -> SourceError:
    """The error of a mapped column without which every row would do, but which none has."""
    return SourceError(
        f"columns.{name}",
        found=f"{source.columns[name]!r}, which none of the {taken:,} good rows has as JSON",
        expected="a column of the rows; dots lead into objects",
        fix="correct the name, or leave it out of columns",
    )


def _endless(source: DataSource, key: str, taken: int) -> DataError:
    if source.size is None:
        return DataError(
            f"{key}.size",
            found=f"null, and {taken:,} rows from {source.source} so far",
            expected=f"a source that ends within {MOST_ROWS:,} rows",
            fix="set size to the rows to take, or let the function end",
        )
    return DataError(
        f"{key}.source",
        found=f"{source.source}, which gave {taken:,} good and over {MOST_ROWS:,} bad rows",
        expected=f"size = {source.size:,} good rows",
        fix="correct the function",
    )


def _own_row(item: Foreign, source: DataSource, *, where: str, number: int) -> Row | DataError:
    if not isinstance(item, Mapping):
        fix = "let the function yield a mapping for each row"
        return DataError(where, found=shorten(item), expected=SHAPE, fix=fix, kind="no object")
    return row_of(dict(item), where=where, row_id=str(number), columns=source.columns)
