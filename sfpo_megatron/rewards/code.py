"""The last Python block of the response passes the tests of its row; partial credit.

A row's answer is a JSON list. An object {"input": TEXT, "output": TEXT} is a run of the program as
a script; text is an assert line (`asserts.py`). Programs run in the sandbox of the tool `python`,
and none of what is expected goes there.
"""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from typing import TypeAlias

from sfpo_megatron.host.processes import adopt_orphans, descendants, send_signal
from sfpo_megatron.rewards import CannotBeJudged, Problem
from sfpo_megatron.rewards.asserts import Assertion, BadTest, assertion
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation
from sfpo_megatron.sandbox.interpreter import Trial, TrialResult, run_trials
from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.process import DidNotStart
from sfpo_megatron.types import Json

MEMORY_BYTES = 512 << 20
CHECKS_S = 2.0
"""For the conditions of a row, once the program has ended."""
_MOST_CHARS = 16 << 20
"""Characters of a row's tests: a process that scores writes 64 MiB to a file and no more."""
_FENCE = re.compile(r"^([ \t]*)```[ \t]*(\w*)", re.MULTILINE)
_LABELS = ("", "python", "python3", "py")
_EXPECTED = 'a JSON list of {"input": TEXT, "output": TEXT} and of assert lines'


@dataclass(kw_only=True, frozen=True, slots=True)
class Script:
    """A run of the program with this stdin, and what it has to print."""

    stdin: str
    stdout: str


Test: TypeAlias = Script | Assertion


def warm_up() -> None:
    """Once a scoring process: find out what isolates programs here."""
    adopt_orphans()
    isolation()


def last_block(text: str) -> str | None:
    """The last fenced block of Python that is closed, else the last without a name, which may be
    what a program prints; without the margin of its fence. None where there is none."""
    found, opened = dict[bool, str](), None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[2]:
            margin, label = opened.groups()
            if label.lower() in _LABELS:
                block = text[text.find("\n", opened.end()) + 1 : fence.start()]
                indent = rf"^[ \t]{{0,{len(margin)}}}"
                found[label != ""] = re.sub(indent, "", block, flags=re.MULTILINE)
            opened = None
    return found.get(True, found.get(False))


def tests_of(answer: str) -> list[Test]:
    """The tests of a row; BadTest for what are none."""
    try:
        items = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise BadTest(f"found no JSON ({error}), expected {_EXPECTED}") from None
    if len(answer) > _MOST_CHARS:
        raise BadTest(f"found {len(answer):,} characters, expected {_MOST_CHARS:,} or fewer")
    if not isinstance(items, list) or not items:
        raise BadTest(f"found no list with tests, expected {_EXPECTED}")
    return [_test(number, item) for number, item in enumerate(items)]


def _test(number: int, item: Json) -> Test:
    if isinstance(item, str):
        try:
            return assertion(item)
        except BadTest as error:
            raise BadTest(f"test {number}: {error}") from None
    if isinstance(item, dict) and item.keys() == {"input", "output"}:
        stdin, stdout = item["input"], item["output"]
        if isinstance(stdin, str) and isinstance(stdout, str):
            return Script(stdin=stdin, stdout=stdout)
    raise BadTest(f"test {number}: found {item!r}, expected an assert line or input and output")


def score(
    response: str, prompt: Problem, *, thinking: str = STRIP, timeout_s: float = 2.0
) -> float:
    """The share of the tests that it passes; those that do not end within `timeout_s`, all of them
    together, are not passed."""
    tests = tests_of(prompt.answer)
    code = last_block(visible(response, thinking))
    return 0.0 if code is None else sum(passed(code, tests, timeout_s)) / len(tests)


def passed(code: str, tests: list[Test], timeout_s: float) -> list[bool]:
    """Whether the program passes each of the tests."""
    trials = [
        Trial(stdin=test.stdin) if isinstance(test, Script) else Trial(expressions=test.expressions)
        for test in tests
    ]
    results = _tried(code, trials, timeout_s)
    verdicts = [False] * len(tests)
    checks: dict[int, str] = {}
    for number, (test, result) in enumerate(zip(tests, results, strict=False)):
        if isinstance(test, Script):
            verdicts[number] = result.status == 0 and _same(result.output, test.stdout)
        elif (check := test.on(result.values)) is not None:
            checks[number] = check
    for number, holds in zip(checks, _hold(list(checks.values())), strict=True):
        verdicts[number] = holds
    return verdicts


def _hold(checks: list[str]) -> list[bool]:
    """Which conditions hold, where no program has been. All in one trial; one by one where that
    does not end, so that a value which takes for ever spoils its own."""
    asked = tuple(f"bool({check})" for check in checks)
    together = _tried("import math", [Trial(expressions=asked)] if asked else [], CHECKS_S)
    if together and together[0].status == 0:
        return [value == "True" for value in together[0].values]
    alone = _tried("import math", [Trial(expressions=(one,)) for one in asked], CHECKS_S)
    holds = [result.values == ("True",) for result in alone]
    return holds + [False] * (len(checks) - len(holds))


def _tried(code: str, trials: list[Trial], timeout_s: float) -> list[TrialResult]:
    if not trials:
        return []
    try:
        return _run(code, trials, timeout_s)
    except (DidNotStart, OSError) as error:
        print(f"a program could not be tried: {error}; once more")
    # What the machine cannot do now, it cannot do for the smallest program either.
    try:
        _run("", [Trial()], timeout_s)
    except (DidNotStart, OSError) as error:
        raise CannotBeJudged(f"programs cannot be tried on this machine now: {error}") from error
    try:
        return _run(code, trials, timeout_s)
    except (DidNotStart, OSError) as error:
        print(f"this program cannot be tried, and others can: {error}")
        return []


def _run(code: str, trials: list[Trial], timeout_s: float) -> list[TrialResult]:
    before = _children()
    try:
        return run_trials(code, trials, timeout_s=timeout_s, memory_bytes=MEMORY_BYTES)
    finally:
        for pid in _children() - before:
            send_signal(pid, signal.SIGKILL)


def _children() -> set[int]:
    """What a program may leave behind where it has no list of processes of its own."""
    return set() if isolation().processes else set(descendants(os.getpid()))


def _same(found: str, wanted: str) -> bool:
    """Equal but for spaces at the ends of lines, and empty lines at the end."""
    return _lines(found) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]  # a form feed ends no line


def explain(
    response: str, prompt: Problem, *, thinking: str = STRIP, timeout_s: float = 2.0
) -> Explanation:
    """The program, and what each test says of it."""
    code = last_block(visible(response, thinking))
    read = []
    if code is not None:
        verdicts = passed(code, tests_of(prompt.answer), timeout_s)
        read = [f"test {n}: {'passed' if ok else 'failed'}" for n, ok in enumerate(verdicts)]
    return {"found": code, "read": read, "reference": prompt.answer, "reference_read": []}


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    try:
        tests_of(answer)
    except BadTest as error:
        return f"answer: {error}"
    return None
