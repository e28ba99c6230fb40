"""Rows of a jsonl file: one object a line with the strings `prompt` and `answer`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row

_SHAPE = 'an object such as {"prompt": "6 * 7 =", "answer": "42"}'


def jsonl_rows(path: str, *, size: int | None, key: str, name: str) -> Iterator[Row | DataError]:
    """The first `size` problems of `path` (null: all). Blank lines are no rows; further keys of an
    object are kept as the prompt's metadata. `key` names the source in messages about the file."""
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"{key}.path", found=shorten(path), expected="a jsonl file", fix="correct the path"
        )
    taken = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if size is not None and taken == size:
                return
            if line.strip():
                row = _row(line, where=f"{path}:{number}", row_id=f"{name}/{number}")
                taken += isinstance(row, Row)
                yield row


def _row(line: bytes, *, where: str, row_id: str) -> Row | DataError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, both ValueErrors
        found = f"{shorten(line.decode(errors='replace').strip(), 60)} ({error})"
        return DataError(where, found=found, expected=_SHAPE, fix="correct or remove the line")
    if not isinstance(value, dict):
        return DataError(
            where, found=shorten(value), expected=_SHAPE, fix="write one object a line"
        )
    for name in ("prompt", "answer"):
        if name not in value:
            found = f"no key {name!r} (keys: {shorten(sorted(value))})"
            return DataError(where, found=found, expected=_SHAPE, fix=f"add {name!r}")
    answer = value["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = _number_text(answer)
    for name, text in (("prompt", value["prompt"]), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            found = f"{name} = {shorten(value[name])}"
            return DataError(
                where, found=found, expected="a string that is not empty", fix=f"correct {name!r}"
            )
    rest = {k: v for k, v in value.items() if k not in ("prompt", "answer")}
    return Row(id=row_id, where=where, question=value["prompt"], answer=answer, metadata=rest)


def _number_text(answer: int | float) -> str:
    """A reference that was written as a JSON number, as text: `42`, not `42.0`."""
    return str(int(answer)) if float(answer).is_integer() else repr(answer)
