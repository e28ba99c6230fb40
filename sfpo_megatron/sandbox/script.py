"""Inside the isolated interpreter: one program, as a script whose last value is printed.

Given {"code"}. Standard library only (`program.py`).
"""

from __future__ import annotations

import ast
import io
import linecache
import os
import sys
import traceback
from typing import Any

_NAME = "<program>"


def main(given: dict[str, Any]) -> int:
    """The exit status of the program."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # input() ends at once
    return run(given["code"], {"__name__": "__main__"})


def run(code: str, names: dict[str, object]) -> int:
    """Run it as a script, and print the value of a last line that is an expression."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what came before a program is ended is there
    linecache.cache[_NAME] = (len(code), None, code.splitlines(keepends=True), _NAME)
    try:
        tree = ast.parse(code, _NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _NAME, "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            code_of_last = compile(ast.Expression(last.value), _NAME, "eval")
            value = eval(code_of_last, names)  # noqa: S307
            if value is not None:
                print(repr(value))
        sys.stdout.flush()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException as error:
        mine = error.__traceback__ and error.__traceback__.tb_next
        if isinstance(error, SyntaxError):
            mine = None
        traceback.print_exception(error.with_traceback(mine), limit=8)
        return 1
    return 0
