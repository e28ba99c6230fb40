"""Records of Arrow batches, with what JSON cannot hold left out before it is converted.

A date, bytes or an image among the columns is no metadata: it would have to go to the scoring
processes, and some (nanoseconds, years past 9999) have no Python value at all. The columns that may
be the prompt or the answer are read whatever they hold, for a message that shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.fields import first_repeated
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import NAMES, row_of
from sfpo_megatron.data.errors import DataError, SourceError
from sfpo_megatron.data.rows import Row

if TYPE_CHECKING:
    import pyarrow


def columns_of(schema: pyarrow.Schema, source: DataSource) -> tuple[list[str], tuple[str, ...]]:
    """Columns to read, and those that are left out."""
    needed = {name.partition(".")[0] for name in source.columns.values()} | set(NAMES)
    needed |= set(source.columns.values())
    kept: list[str] = []
    left_out: list[str] = []
    _require_names(schema, "columns")
    for field in schema:
        _require_names(field.type, f"fields in column {field.name!r}")
        usable = _is_json(field.type) or (field.name in needed and _has_value(field.type))
        (kept if usable else left_out).append(field.name)
    return kept, tuple(left_out)


def _require_names(fields: Iterable[pyarrow.Field] | pyarrow.DataType, what: str) -> None:
    """SourceError where two have one name, of which Python would have one at most."""
    import pyarrow

    if isinstance(fields, pyarrow.DataType):
        for inner in _inner(fields):
            _require_names(inner, what)
        fields = fields if pyarrow.types.is_struct(fields) else ()
    if (twice := first_repeated(field.name for field in fields)) is not None:
        raise SourceError(
            "path",
            found=f"two {what} named {twice!r}",
            expected="one of each name",
            fix="rename or drop one of them in the file",
        )


def rows_of(
    batches: Iterable[Any], source: DataSource, left_out: tuple[str, ...], at: str, prefix: str = ""
) -> Iterator[Row | DataError]:
    """The problems of batches (or tables), numbered from 1. `at`: what stands before the number in
    a message; `prefix`: in an id."""
    for number, record in enumerate(records_of(batches), start=1):
        where = f"{at}:{number}"
        if isinstance(record, UnicodeDecodeError):
            fix = "correct or remove the row"
            yield DataError(where, found=f"bytes that are no text ({record})",
                            expected="text in UTF-8", fix=fix, kind="not Unicode text")  # fmt: skip
            continue
        yield row_of(
            record,
            where=where,
            row_id=f"{prefix}{number}",
            columns=source.columns,
            left_out=left_out,
        )


def records_of(batches: Iterable[Any]) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The records of batches (or tables), numbers as they were written; the error in the place of
    one whose text is none."""
    for batch in batches:
        fields = [(field.name, field.type) for field in batch.schema if _has_short(field.type)]
        for record in _listed(batch):
            if isinstance(record, dict):
                for name, kind in fields:
                    record[name] = _shortest(record[name], kind)
            yield record


def _listed(batch: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
    try:
        listed: list[dict[str, Any] | UnicodeDecodeError] = batch.to_pylist()
        return listed
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        half = batch.num_rows // 2
        return [*_listed(batch.slice(0, half)), *_listed(batch.slice(half))]


def _inner(kind: pyarrow.DataType) -> list[pyarrow.DataType]:
    """The types that a nested one is made of."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return [kind.value_type]
    return [kind.field(index).type for index in range(kind.num_fields)]


def _is_json(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if inner := _inner(kind):
        return all(map(_is_json, inner))
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_null(kind)
    )


def _has_value(kind: pyarrow.DataType) -> bool:
    """Whether every value of this type has a Python value."""
    from pyarrow import types

    inner = _inner(kind)
    return all(map(_has_value, inner)) if inner else not types.is_temporal(kind)


def _has_short(kind: pyarrow.DataType) -> bool:
    """Whether there are floats of less than 64 bits in it."""
    from pyarrow import types

    return types.is_float32(kind) or types.is_float16(kind) or any(map(_has_short, _inner(kind)))


def _shortest(value: Any, kind: pyarrow.DataType) -> Any:
    """The same with 0.1 where a float32 column has what Python shows as 0.10000000149011612."""
    import numpy
    from pyarrow import types

    if value is None or not _has_short(kind):
        return value
    if types.is_float32(kind):
        return float(str(numpy.float32(value)))
    if types.is_float16(kind):
        return float(str(numpy.float16(value)))
    if types.is_struct(kind):
        return {
            kind.field(index).name: _shortest(value[kind.field(index).name], kind.field(index).type)
            for index in range(kind.num_fields)
        }
    if types.is_dictionary(kind):
        return _shortest(value, kind.value_type)
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_shortest(item, kind.value_type) for item in value]
    return value
