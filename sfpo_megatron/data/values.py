"""Values of a row's columns: numbers as the text that a reference is, and what JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol, TypeAlias, runtime_checkable

from sfpo_megatron.data.errors import shorten

_LARGEST, _SMALLEST = 308, -400
"""Powers of ten of the numbers that are taken."""
_BEYOND = 10 ** (_LARGEST + 1)
_EXACT_CHARS = 16  # a float written in so many has the value that is written, unless it is 0 or inf


@runtime_checkable
class _Array(Protocol):
    """What numpy's scalars and arrays have, seen without an import of numpy."""

    dtype: Any
    shape: tuple[int, ...]

    def tolist(self) -> Any: ...


_Scalar: TypeAlias = bool | int | float | str | Decimal | bytes | date | time | timedelta | None
Cell: TypeAlias = _Scalar | _Array | list["Cell"] | tuple["Cell", ...] | dict[str, "Cell"]
"""What a column of any kind of file has for a row; JSON can hold some of it."""


def written_float(text: str) -> float | Decimal:
    """The number that a JSON file has written, for `json.loads`: a Decimal where a float is not
    that number; ValueError for an exponent that is beyond those too."""
    value = float(text)
    if len(text) <= _EXACT_CHARS and value != 0.0 and not math.isinf(value):
        return value
    try:
        exact = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{shorten(text, 40)} has an exponent that no number has") from None
    return value if not math.isinf(value) and Decimal(repr(value)) == exact else exact


def number_text(value: Cell) -> str | None:
    """A reference that was given as a number, as text: `42`, not `42.0`; 0.0000001, not 1e-07.
    None for what is no number, not finite, or far past what a float holds."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value) if abs(value) < _BEYOND else None
    if isinstance(value, Decimal):
        number = value
    elif isinstance(value, float):
        number = Decimal(repr(float(value)))  # numpy's float64 is a float with another repr
    elif isinstance(value, _Array) and value.shape == () and value.dtype.kind in "iuf":
        number = Decimal(str(value))  # the fewest digits that are this float32
    else:
        return None
    if not number.is_finite() or (number and not _SMALLEST <= number.adjusted() <= _LARGEST):
        return None
    plain = format(number, "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: half of a surrogate pair is no character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def absent(value: Cell) -> bool:
    """Whether a column has nothing for this row: null, NaN (pandas' null), white space."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, float) and math.isnan(value)


def as_list(value: Cell) -> Cell:
    """An array of numpy as a list; everything else as it is."""
    return value.tolist() if isinstance(value, _Array) and len(value.shape) == 1 else value


def message_text(message: Cell) -> str | None:
    """The text of a conversation's message, also one that is a list of parts of text; None for
    another content."""
    content = as_list(message.get("content")) if isinstance(message, dict) else None
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    return content if isinstance(content, str) else None


def json_only(metadata: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The columns that JSON can hold, as they are, and the names of the others. Numbers of numpy
    and decimals become plain ones."""
    if not metadata or _is_json(metadata):
        return metadata, ()
    kept, left_out = {}, []
    for name, item in metadata.items():
        try:
            item = item if _is_json(item) else _plain(item)
        except RecursionError:
            pass
        if _is_json(item) and isinstance(name, str) and is_text(name):
            kept[name] = item
        else:
            left_out.append(str(name))
    return kept, tuple(left_out)


def _plain(item: Any) -> Any:
    if isinstance(item, Decimal):
        return float(item)
    if isinstance(item, _Array):
        return item.tolist()
    if isinstance(item, Mapping):
        return {key: _plain(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(_plain(value) for value in item) if type(item) in (list, tuple) else item
    return item


def _is_json(item: Cell) -> bool:
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True
