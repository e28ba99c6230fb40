"""Inside the isolated interpreter: a program tried again and again, each time in a fork.

Given {"code", "trials": [{"stdin", "expressions"}, ...]}. A trial with expressions runs the code as
a module and evaluates them in it, one without runs it as a script. Standard library only
(`program.py`).

out  a line for each trial that has ended: {"status", "output", "values": [text or null, ...]}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from itertools import islice
from types import ModuleType
from typing import Any, TypeAlias

_MOST_RESULTS = 8 << 20  # bytes of all lines
_MOST_ITEMS = 100_000
_Tried: TypeAlias = dict[str, int | str | list[str | None]]


def main(given: dict[str, Any]) -> int:
    """Always 0: each trial has a status of its own."""
    results, left = os.dup(1), _MOST_RESULTS
    for trial in given["trials"]:
        line = json.dumps(_tried(given["code"], trial, results)).encode() + b"\n"
        left -= len(line)
        if left < 0:
            break
        while line:
            line = line[os.write(results, line) :]
    return 0


def _tried(code: str, trial: dict[str, Any], results: int) -> _Tried:
    stdin, output, values = (os.memfd_create("trial") for _ in range(3))
    os.write(stdin, trial["stdin"].encode(errors="replace"))
    os.lseek(stdin, 0, os.SEEK_SET)
    child = os.fork()
    if not child:
        os.close(results)
        status = 1
        try:
            os.setpgid(0, 0)
            status = _run(code, trial["expressions"], stdin, output, values)
        finally:
            os._exit(status)  # whatever it has put into atexit
    _, status = os.waitpid(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)  # what it has left behind
    except ProcessLookupError:
        pass
    found: _Tried = {
        "status": os.waitstatus_to_exitcode(status),
        "output": _content(output),
        "values": _values(_content(values), len(trial["expressions"])),
    }
    for descriptor in (stdin, output, values):
        os.close(descriptor)
    return found


def _run(code: str, expressions: list[str], stdin: int, output: int, values: int) -> int:
    """In the fork."""
    os.dup2(stdin, 0)
    os.dup2(output, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    module = ModuleType("program" if expressions else "__main__")
    sys.modules[module.__name__] = module
    status = 0
    try:
        exec(compile(code, "<program>", "exec"), module.__dict__)  # noqa: S102
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
    sys.stdout.flush()
    for index, expression in enumerate(expressions):
        try:
            value = written(eval(expression, module.__dict__))  # noqa: S307
        except Exception:
            continue
        os.write(values, json.dumps([index, value]).encode() + b"\n")
    return status


def written(value: object) -> str:
    """The value as Python that holds nothing but literals, `iter([...])` and `range(...)`;
    TypeError for one that cannot be written so."""
    if isinstance(value, range):
        return repr(value)
    if isinstance(value, KeysView | ValuesView | ItemsView):
        return repr(plain(list(value)))
    if isinstance(value, Iterator | deque):
        items = list(islice(value, _MOST_ITEMS + 1))
        if len(items) > _MOST_ITEMS:
            raise TypeError("it goes on and on")
        return f"iter({plain(items)!r})"
    return repr(plain(value))


def plain(value: object) -> object:
    """The value as the literals that it could be written with; TypeError for one that is none."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)  # of a subclass too
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return complex(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, set | frozenset):
        return set(map(plain, value))
    raise TypeError(type(value).__name__)


def _content(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as stream:
        return stream.read().decode(errors="replace")


def _values(lines: str, count: int) -> list[str | None]:
    found: list[str | None] = [None] * count
    for line in lines.splitlines():
        try:
            index, value = json.loads(line)
            found[index] = str(value)
        except (ValueError, TypeError, IndexError):  # the program has written there
            continue
    return found
