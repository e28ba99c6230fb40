"""The number of rows of a parquet file, from its footer: pyarrow takes a second to import.

The footer is a Thrift struct in the compact protocol; of FileMetaData, `version` (1) and `schema`
(2) are passed over and `num_rows` (3) is read (parquet.thrift, apache/parquet-format).
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

_MAGIC = b"PAR1"
_NUM_ROWS = 3
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def num_rows(path: Path) -> int | None:
    """Rows of the file; None if it is not a whole parquet file, or an encrypted one."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size < 12:
            return None
        file.seek(size - 8)
        length, magic = struct.unpack("<I4s", file.read(8))
        if magic != _MAGIC or length > size - 12:
            return None
        file.seek(size - 8 - length)
        footer = io.BytesIO(file.read(length))
    try:
        return _rows(footer)
    except (EOFError, RecursionError):
        return None


def _rows(footer: io.BytesIO) -> int | None:
    field = 0
    while kind := _field(footer):
        delta, type_ = kind
        field = delta + field if delta else _zigzag(footer)
        if field == _NUM_ROWS and type_ == _I64:
            return _zigzag(footer)
        _skip(footer, type_)
    return None


def _field(footer: io.BytesIO) -> tuple[int, int] | None:
    """How far the field's id is from the one before, and its type; None at the struct's end."""
    head = _byte(footer)
    return (head >> 4, head & 15) if head else None


def _skip(footer: io.BytesIO, type_: int) -> None:
    if type_ in (_I16, _I32, _I64):
        _varint(footer)
    elif type_ in (_BYTE, _DOUBLE, _BINARY):
        length = {_BYTE: 1, _DOUBLE: 8}.get(type_)
        footer.seek(_varint(footer) if length is None else length, io.SEEK_CUR)
    elif type_ in (_LIST, _SET):
        head = _byte(footer)
        count = head >> 4 if head >> 4 != 15 else _varint(footer)
        for _ in range(count):
            _skip_element(footer, head & 15)
    elif type_ == _MAP:
        count = _varint(footer)
        types = _byte(footer) if count else 0
        for _ in range(count):
            _skip_element(footer, types >> 4)
            _skip_element(footer, types & 15)
    elif type_ == _STRUCT:
        while kind := _field(footer):
            if not kind[0]:
                _zigzag(footer)
            _skip(footer, kind[1])
    elif type_ not in (_TRUE, _FALSE):
        raise EOFError(f"no Thrift type {type_}")


def _skip_element(footer: io.BytesIO, type_: int) -> None:
    """Pass over one element of a list or map: there a truth value has a byte of its own."""
    _skip(footer, _BYTE if type_ in (_TRUE, _FALSE) else type_)


def _byte(footer: io.BytesIO) -> int:
    read = footer.read(1)
    if not read:
        raise EOFError
    return read[0]


def _varint(footer: io.BytesIO) -> int:
    value, shift = 0, 0
    while True:
        byte = _byte(footer)
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
        if shift > 70:
            raise EOFError("no varint")


def _zigzag(footer: io.BytesIO) -> int:
    value = _varint(footer)
    return (value >> 1) ^ -(value & 1)
