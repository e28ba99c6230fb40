"""Run by an isolated interpreter: limits itself, then runs the program that stdin brings.

Reads {"code", "folder", "memory_bytes", "file_bytes", "cpu_s"}. Standard library only, and of this
package only the file beside it: the interpreter has no other path.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import linecache
import os
import resource
import sys
import traceback
from types import ModuleType

_NAME = "<program>"
_SEEN = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def main() -> int:
    """The exit status."""
    given = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # input() ends at once
    limit(given)
    return run(given["code"])


def limit(given: dict[str, int]) -> None:
    """Limit this process and what it starts, before the program is run."""
    cpu_s = int(given["cpu_s"]) + 1
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, given["memory_bytes"]),
        (resource.RLIMIT_FSIZE, given["file_bytes"]),
        (resource.RLIMIT_CPU, cpu_s),
    ):
        resource.setrlimit(what, (most, most))
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    _landlock().restrict(
        readable=(*_SEEN, *_DEVICES, *prefixes, sys.prefix, sys.base_prefix),
        writable=(given["folder"], "/dev/null"),
    )


def _landlock() -> ModuleType:
    """The file beside this one, without the package that it is in."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "landlock.py")
    spec = importlib.util.spec_from_file_location("landlock", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(code: str) -> int:
    """Run it as a script, and print the value of a last line that is an expression."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what came before a program is ended is there
    linecache.cache[_NAME] = (len(code), None, code.splitlines(keepends=True), _NAME)
    names: dict[str, object] = {"__name__": "__main__"}
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


if __name__ == "__main__":
    status = main()
    try:
        sys.stdout.flush()
    except OSError:
        os._exit(1)  # it has printed more than it may
    sys.exit(status)
