"""Inside the isolated interpreter: programs, as scripts whose last value is printed.

Given {"code"}, one program; or {"replies": FD}, then one after another in the same namespace:

in   a line of JSON for each program: its text
out  on FD, b"0\\n" once, and the exit status of each program that has ended; what it printed is all
     that stdout, a file, has

Standard library only (`program.py`).
"""

from __future__ import annotations

import ast
import io
import json
import linecache
import os
import sys
import traceback
from contextlib import suppress
from types import CodeType
from typing import Any

_NAME = "<program>"


def main(given: dict[str, Any]) -> int:
    """The exit status of the program."""
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # input() ends at once
    names: dict[str, object] = {"__name__": "__main__"}
    if "code" in given:
        return run(given["code"], names)
    os.write(given["replies"], b"0\n")
    for line in requests:
        sys.stdout, sys.stderr = _stream(1), _stream(2)  # whatever the last one did to them
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
        os.write(given["replies"], b"%d\n" % run(json.loads(line), names))
    return 0


def _stream(descriptor: int) -> io.TextIOWrapper:
    return open(descriptor, "w", 1, "utf-8", "replace", closefd=False)


def _read(code: str) -> tuple[CodeType, CodeType | None]:
    """The program without a last line that is an expression, and that expression."""
    tree = ast.parse(code, _NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, _NAME, "exec", dont_inherit=True)
    if not isinstance(last, ast.Expr):
        return body, None
    return body, compile(ast.Expression(last.value), _NAME, "eval", dont_inherit=True)


def run(code: str, names: dict[str, object]) -> int:
    """Run it as a script, and print the value of a last line that is an expression."""
    printed = sys.stdout  # the program may put something else there
    assert isinstance(printed, io.TextIOWrapper)
    printed.reconfigure(line_buffering=True)  # what came before a program is ended is there
    linecache.cache[_NAME] = (len(code), None, code.splitlines(keepends=True), _NAME)
    is_read = False
    try:
        body, last = _read(code)
        is_read = True
        exec(body, names)  # noqa: S102
        if last is not None:
            value = eval(last, names)  # noqa: S307
            if value is not None:
                print(repr(value))
        printed.flush()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        with suppress(Exception):  # as below; and its text is the program's own to make
            print(error.code, file=sys.stderr, flush=True)
        return 1
    except BaseException as error:
        # What reads it is no part of the program.
        mine = error.__traceback__ and error.__traceback__.tb_next if is_read else None
        with suppress(OSError, ValueError):  # it has printed more than it may, or closed stderr
            traceback.print_exception(error.with_traceback(mine), limit=8)
            sys.stderr.flush()
        return 1
    return 0
