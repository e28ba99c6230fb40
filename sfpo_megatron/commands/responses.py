"""Responses in a file of JSON lines, with what they are compared with."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from sfpo_megatron.config.source_files import LINES, NoLines, is_blank, lines_in, text_of
from sfpo_megatron.config.yaml_text import shorten
from sfpo_megatron.data.values import json_only, number_text
from sfpo_megatron.data.written_json import read_written
from sfpo_megatron.rewards.returned import shown
from sfpo_megatron.rewards.wire import WireProblem

STDIN = "-"
_SHAPE = '{"response": "... 42", "answer": "42"}'
_USED = ("response", "answer", "question")


class NoFile(ValueError):
    """There is no such file, or it cannot be read."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Line:
    """One response."""

    where: str
    """`FILE:LINE`."""
    number: int
    problem: WireProblem
    response: str


@dataclass(kw_only=True, frozen=True, slots=True)
class BadLine:
    """A line that holds none."""

    where: str
    number: int
    what: str
    """What was found, and what was expected."""


def lines_of(path: str, *, needs_answer: bool) -> Iterator[Line | BadLine]:
    """The lines of a file, or of stdin for `-`, as they are read; blank ones are none. NoFile at
    once, or where it cannot be read to its end."""
    if path == STDIN:
        assert isinstance(sys.stdin.buffer, BufferedReader)
        return _lines(sys.stdin.buffer, "stdin", needs_answer)
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "a directory")
        file = open(path, "rb")  # noqa: SIM115 - the generator closes it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise NoFile(
            f"{path}: found {reason}, expected a file with a line of JSON a response; correct the "
            "path"
        ) from error
    return _lines(file, path, needs_answer)


def _lines(file: BufferedReader, name: str, needs_answer: bool) -> Iterator[Line | BadLine]:
    try:
        with file:
            for number, text in enumerate(lines_in(file), start=1):
                if not is_blank(text):
                    yield _line(text, f"{name}:{number}", number, needs_answer)
    except (NoLines, OSError, EOFError, zlib.error) as error:
        raise NoFile(f"{name}: found {error}, expected {LINES}; convert or unpack it") from error


def _line(text: bytes, where: str, number: int, needs_answer: bool) -> Line | BadLine:
    def bad(found: str, fix: str = "correct the line") -> BadLine:
        what = f"found {found}, expected an object such as {_SHAPE}; {fix}"
        return BadLine(where=where, number=number, what=what)

    try:
        row = read_written(text_of(text))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8: both are ValueErrors
        return bad(f"{shorten(repr(text[:200].decode(errors='replace').strip()))} ({error})")
    if not isinstance(row, dict):
        return bad(shown(row))
    for name in ("response", "answer") if needs_answer else ("response",):
        if name not in row:
            return bad(f"no field {name!r} (fields: {', '.join(row) or 'none'})", f"add {name!r}")
    response, question = row["response"], row.get("question") or ""
    given = row.get("answer", "")
    answer = given if isinstance(given, str) else number_text(given)
    if not isinstance(response, str):
        return bad(f"response = {shown(response)}", "make it text")
    if not isinstance(question, str):
        return bad(f"question = {shown(question)}", "make it text")
    if answer is None or (needs_answer and not answer.strip()):
        return bad(f"answer = {shown(row.get('answer'))}", "make it text that is not empty")
    metadata, _ = json_only({name: value for name, value in row.items() if name not in _USED})
    problem = WireProblem(id=where, question=question, answer=answer, metadata=metadata)
    return Line(where=where, number=number, problem=problem, response=response)
