"""Records of Arrow batches, with what JSON cannot hold left out before it is converted.

A date, bytes or an image among the columns is no metadata: it would have to go to the scoring
processes, and some (nanoseconds, years past 9999) have no Python value at all. The columns that may
be the prompt or the answer are read whatever they hold, for a message that shows it. What Arrow
keeps as JSON (the library `datasets` does, where a column's values are of several types) is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.fields import first_repeated
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.columns import NAMES, row_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.written_json import read_written

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
    if left_out and not kept:
        raise SourceError(
            "path",
            found=f"no column that JSON can hold, of {', '.join(left_out)}",
            expected="columns of text or numbers: a prompt and an answer",
            fix="correct the path, or the file",
        )
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
        if isinstance(record, ValueError):
            yield _no_record(record, where)
            continue
        yield row_of(
            record,
            where=where,
            row_id=f"{prefix}{number}",
            columns=source.columns,
            left_out=left_out,
        )


def _no_record(error: ValueError, where: str) -> DataError:
    fix = "correct or remove the row"
    if isinstance(error, UnicodeDecodeError):
        return DataError(where, found=f"bytes that are no text ({error})",
                         expected="text in UTF-8", fix=fix, kind="not Unicode text")  # fmt: skip
    return DataError(where, found=str(error), expected="JSON", fix=fix, kind="not JSON")


def records_of(batches: Iterable[Any]) -> Iterator[dict[str, Any] | ValueError]:
    """The records of batches (or tables), numbers as they were written and JSON read; the error in
    the place of one whose text is none, or whose JSON is none."""
    for batch in batches:
        fields = [(field.name, field.type) for field in batch.schema if _is_stored(field.type)]
        for record in _listed(batch):
            yield _as_written(record, fields) if isinstance(record, dict) else record


def _as_written(
    record: dict[str, Any], fields: Iterable[tuple[str, pyarrow.DataType]]
) -> dict[str, Any] | ValueError:
    for name, kind in fields:
        try:
            record[name] = _written(record[name], kind)
        except (ValueError, RecursionError) as error:
            return ValueError(f"{name} = {shorten(record[name], 60)} in a column of JSON ({error})")
    return record


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
    return _is_json_text(kind) or bool(
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


def _is_json_text(kind: pyarrow.DataType) -> bool:
    """Whether it is text that stands for a value of JSON."""
    return bool(getattr(kind, "extension_name", "") == "arrow.json")


def _is_stored(kind: pyarrow.DataType) -> bool:
    """Whether there is in it what Python shows otherwise than it was written: floats of less than
    64 bits, and JSON."""
    from pyarrow import types

    short = types.is_float32(kind) or types.is_float16(kind)
    return short or _is_json_text(kind) or any(map(_is_stored, _inner(kind)))


def _written(value: Any, kind: pyarrow.DataType) -> Any:
    """The same with 0.1 where a float32 column has what Python shows as 0.10000000149011612, and
    with the value of a JSON text; ValueError or RecursionError for one that is none."""
    import numpy
    from pyarrow import types

    if value is None or not _is_stored(kind):
        return value
    if _is_json_text(kind):
        return read_written(value)
    if types.is_float32(kind):
        return float(str(numpy.float32(value)))
    if types.is_float16(kind):
        return float(str(numpy.float16(value)))
    if types.is_struct(kind):
        return {
            kind.field(index).name: _written(value[kind.field(index).name], kind.field(index).type)
            for index in range(kind.num_fields)
        }
    if types.is_dictionary(kind):
        return _written(value, kind.value_type)
    if types.is_map(kind):
        return [
            (_written(name, kind.key_type), _written(item, kind.item_type)) for name, item in value
        ]
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_written(item, kind.value_type) for item in value]
    return value
