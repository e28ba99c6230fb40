"""Inside the isolated interpreter: a program tried again and again, each time in a fork.

Given {"code", "trials": [{"stdin", "expressions", "before", "setup", "modules"}, ...]}. A trial
with expressions runs the code as a module that has the modules and what is before it, then the
setup, and evaluates them in it; one without runs it as a script. Standard library only
(`program.py`).

out  a line for each trial that has ended: {"status", "output", "values": [text or null, ...]}
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import suppress
from enum import Enum
from itertools import islice
from types import ModuleType
from typing import Any, NoReturn, TypeAlias

_MOST_RESULTS = 64 << 20  # bytes of all lines
_MOST_ITEMS = 100_000
_Tried: TypeAlias = dict[str, int | str | list[str | None]]
_DECIMAL_BITS = 10_000  # Python writes no number of over 4300 digits
_CLOCK = ("hour", "minute", "second", "microsecond")
_PARTS = {
    "fractions.Fraction": ("numerator", "denominator"),
    "datetime.date": ("year", "month", "day"),
    "datetime.datetime": ("year", "month", "day", *_CLOCK),
    "datetime.time": _CLOCK,
    "datetime.timedelta": ("days", "seconds", "microseconds"),
}
"""What makes an object of these classes again."""


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
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.write(stdin, trial["stdin"].encode(errors="replace"))
    os.lseek(stdin, 0, os.SEEK_SET)
    os.mkdir(folder := f"trial-{time.monotonic_ns()}")
    child = os.fork()
    if not child:
        os.close(results)
        os.setpgid(0, 0)
        os.chdir(folder)
        for stream, descriptor in enumerate((stdin, output, nothing)):
            os.dup2(descriptor, stream)
        _standard_streams()
        if trial["expressions"]:
            _evaluate(code, trial, values)
        _run(code)
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
    for descriptor in (stdin, output, nothing, values):
        os.close(descriptor)
    return found


def _standard_streams() -> None:
    """New ones, under the names too by which a program finds them when it has replaced them."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = open(descriptor, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _module(name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = os.path.abspath("program.py")
    return module


def _execute(code: str, name: str, names: dict[str, Any]) -> None:
    """This file's own `from __future__` is none of theirs."""
    exec(compile(code, f"<{name}>", "exec", dont_inherit=True), names)  # noqa: S102


def _run(code: str) -> NoReturn:
    """Run the code, in the fork, as a script, which ends as Python does, with its threads, atexit
    and streams."""
    _execute(code, "program", _module("__main__").__dict__)
    raise SystemExit  # `sys.exit` may be the program's


def _evaluate(code: str, trial: dict[str, Any], values: int) -> NoReturn:
    """Evaluate the expressions, in the fork, in the program as a module. Names of Python itself are
    Python's there, whatever the program calls so."""
    names, own = _module("program").__dict__, dict(vars(builtins))
    names.update((name, importlib.import_module(name)) for name in trial["modules"])
    _execute(trial["before"], "before", names)
    with suppress(SystemExit):
        _execute(code, "program", names)
    _execute(trial["setup"], "setup", names)
    for index, expression in enumerate(trial["expressions"]):
        try:
            value = written(eval(expression, names, own))  # noqa: S307
        except Exception:
            continue
        os.write(values, json.dumps([index, value]).encode() + b"\n")
    os._exit(0)  # it is a module: threads that it has started do not count


def written(value: object) -> str:
    """The value as Python that holds nothing but literals and calls of what is no program's;
    TypeError for one that cannot be written so."""
    if value is None or isinstance(value, bool | range):
        return repr(value)
    if isinstance(value, int):
        number = int(value)  # of a subclass too
        return hex(number) if number.bit_length() > _DECIMAL_BITS else repr(number)
    if isinstance(value, float):
        text = repr(float(value))
        return f"float({text!r})" if text[-1] in "fn" else text
    if isinstance(value, complex):
        return f"complex({written(value.real)}, {written(value.imag)})"
    if isinstance(value, str):
        return repr(str.__str__(value))  # of a member of an enumeration of texts its own
    if isinstance(value, bytes):
        return repr(bytes(value))
    if isinstance(value, bytearray):
        return f"bytearray({bytes(value)!r})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(key)}: {written(one)}' for key, one in value.items())}}}"
    return _collection(value) or _of_a_class(value)


def _collection(value: object) -> str | None:
    if isinstance(value, list):
        return f"[{_items(value)}]"
    if isinstance(value, tuple):
        return f"({_items(value)})"
    if isinstance(value, set):
        return f"set([{_items(value)}])"
    if isinstance(value, frozenset):
        return f"frozenset([{_items(value)}])"
    if isinstance(value, deque):
        return f"__import__('collections').deque([{_items(value)}])"
    if isinstance(value, KeysView):
        return f"{written(dict.fromkeys(value))}.keys()"
    if isinstance(value, ItemsView):
        return f"{written(dict(value))}.items()"
    if isinstance(value, ValuesView):
        return f"{written(dict(enumerate(value)))}.values()"
    if isinstance(value, Iterator):
        items = list(islice(value, _MOST_ITEMS + 1))
        if len(items) > _MOST_ITEMS:
            raise TypeError("it goes on and on")
        return f"iter([{_items(items)}])"
    return None


def _items(values: Iterable[object]) -> str:
    return "".join(f"{written(value)}, " for value in values)


def _of_a_class(value: Any) -> str:
    """A number, a date or an array of a library; a dataclass or a member of an enumeration as its
    name and what it is equal by; a match as what is true, and equals nothing."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _PARTS and getattr(value, "tzinfo", None) is None:
        arguments = _items(getattr(value, part) for part in _PARTS[name])
        return f"__import__({kind.__module__!r}).{kind.__qualname__}({arguments})"
    if name == "decimal.Decimal":
        return f"__import__('decimal').Decimal({str(value)!r})"
    if isinstance(value, re.Match):
        return written(("re.Match", value.span()))
    if isinstance(value, Enum):
        return written((kind.__qualname__, value.name))
    if hasattr(kind, "__dataclass_fields__") and kind.__dataclass_params__.eq:
        fields = sys.modules["dataclasses"].fields(kind)  # slow to import
        parts = [getattr(value, field.name) for field in fields if field.compare]
        return written((kind.__qualname__, *parts))
    if callable(getattr(value, "tolist", None)):  # of NumPy, of torch, an array
        return written(value.tolist())
    raise TypeError(name)


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
