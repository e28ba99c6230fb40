"""Tests as public data sets of programs have them, brought into the form of `code.py`.

    {"inputs": [...], "outputs": [...], "fn_name": NAME}        APPS, TACO, Eurus-2-RL
    {"language": "python", "test_cases": [...]}                 PrimeIntellect's verification_info
    [{"input", "output", "type" or "testtype", "fn_name" or "metadata": {"func_name"}}, ...]
                                                                DeepCoder, LiveCodeBench

Without a function's name a test is a run of a script, with one it is a call of that function, or
of that method of a class `Solution`. What is compared is what JSON has: a tuple is a list, a key of
a dictionary is text; and a value may stand in a list of its own, as APPS has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from keyword import iskeyword

from sfpo_megatron.rewards.setups import PYTHON_S, BadTest
from sfpo_megatron.types import Json

_MARKS = ("type", "testtype", "fn_name", "metadata")
_SCRIPTS = ("stdin", "stdin_stdout")
_PYTHONS = ("python", "python3", "py")
_BEFORE = """\
import collections, functools, heapq, itertools, math, operator, random, re, string, sys, typing
from typing import *
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
del pow
"""
"""What LeetCode gives a program, and its judges do too: solutions write `List[int]` without import.
`pow` stays Python's."""
_SETUP = """\
def _plain_of_data_set(value):
    if isinstance(value, (list, tuple)):
        return [_plain_of_data_set(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain_of_data_set(one) for key, one in value.items()}
    return value
def _equals_in_data_set(value, wanted):
    value = _plain_of_data_set(value)
    return value == wanted or isinstance(wanted, list) and len(wanted) == 1 and value == wanted[0]
if "Solution" in globals() and hasattr(Solution, "NAME"):
    _function_of_data_set = Solution().NAME
else:
    _function_of_data_set = FUNCTION
"""


def own_form(content: Json) -> Json:
    """The tests in the form of `code.py`, or `content` as it is where it is none of the above.
    BadTest for what is one, and cannot be used."""
    if isinstance(content, dict) and "test_cases" in content:
        language = content.get("language") or "python"
        if str(language).lower() not in _PYTHONS:
            raise BadTest(f"found tests of the language {language!r}, expected python")
        return own_form(content["test_cases"])
    if isinstance(content, dict) and {"inputs", "outputs"} <= content.keys():
        return list(_own(_cases(content)))
    if isinstance(content, list) and any(_is_marked(item) for item in content):
        return list(_own(content))
    return content


def _is_marked(item: Json) -> bool:
    return (
        isinstance(item, dict)
        and {"input", "output"} <= item.keys()
        and not item.keys().isdisjoint(_MARKS)
    )


def _cases(content: dict[str, Json]) -> list[Json]:
    inputs, outputs = content["inputs"], content["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise BadTest("found inputs and outputs that do not belong to each other, expected lists")
    name = content.get("fn_name")
    return [
        {"input": one, "output": other, "fn_name": name}
        for one, other in zip(inputs, outputs, strict=True)
    ]


def _own(cases: Sequence[Json]) -> Iterator[Json]:
    names = {name for case in cases if (name := _function(case)) is not None}
    if len(names) > 1:
        raise BadTest(f"found calls of {' and '.join(sorted(names))}, expected one function a row")
    for name in names:
        function = f"globals()[{name!r}]" if name in PYTHON_S else name
        yield {"before": _BEFORE}
        yield {"setup": _SETUP.replace("NAME", name).replace("FUNCTION", function)}
    for number, case in enumerate(cases):
        if not isinstance(case, dict) or not {"input", "output"} <= case.keys():
            raise BadTest(f"test {number}: found {case!r}, expected input and output")
        try:
            yield _call(case) if _function(case) is not None else _script(case)
        except ValueError as error:  # of JSON too
            raise BadTest(f"test {number}: {error}") from None


def _function(case: Json) -> str | None:
    """The name of the function that a test calls; None if it runs a script."""
    if not isinstance(case, dict):
        return None
    kind = case.get("type") or case.get("testtype")
    more = case.get("metadata")
    if isinstance(more, str):
        more = json.loads(more) if more.strip().startswith("{") else {}
    name = case.get("fn_name") or (more.get("func_name") if isinstance(more, dict) else None)
    if kind in _SCRIPTS or (kind is None and name is None):
        return None
    if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
        raise BadTest(f"found a test that calls {name!r}, expected fn_name, a function's name")
    return name


def _script(case: dict[str, Json]) -> Json:
    return {"input": _text(case["input"]), "output": _text(case["output"])}


def _text(lines: Json) -> Json:
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        return "\n".join(map(str, lines))
    return lines  # no text is named where tests are read


def _call(case: dict[str, Json]) -> str:
    """An assert line. Arguments and value are those of the test, or text with JSON: a line for each
    argument."""
    arguments, value = case["input"], case["output"]
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
        value = json.loads(value) if isinstance(value, str) else value
    given = arguments if isinstance(arguments, list) else [arguments]
    call = f"_function_of_data_set({', '.join(map(_argument, given))})"
    return f"assert _equals_in_data_set({call}, {_literal(value)})"


def _argument(value: Json) -> str:
    """Numbers were keys before they were written as JSON."""
    if isinstance(value, dict) and value and all(key.lstrip("-").isdecimal() for key in value):
        return f"{{{_joined(f'{int(key)}: {_literal(one)}' for key, one in value.items())}}}"
    return _literal(value)


def _literal(value: Json) -> str:
    if isinstance(value, list):
        return f"[{_joined(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{_joined(f'{key!r}: {_literal(one)}' for key, one in value.items())}}}"
    text = repr(value)
    return f"float({text!r})" if text in ("inf", "-inf", "nan") else text


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)
