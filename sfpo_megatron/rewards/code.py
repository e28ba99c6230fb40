"""The last Python block of the response passes the tests of its row; partial credit.

A row's answer is a JSON list. An object {"input": TEXT, "output": TEXT} is a run of the program as
a script; text is an assert line (`asserts.py`), {"setup": TEXT} what such lines take for granted
(`setups.py`), {"before": TEXT} what their program does; or it is in the form of a public data set
(`dataset_tests.py`). Programs run in the sandbox of the tool `python`, and none of what is expected
goes there.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import TypeAlias

from sfpo_megatron.host.processes import adopt_orphans, descendants, send_signal
from sfpo_megatron.rewards import CannotBeJudged, Problem
from sfpo_megatron.rewards.asserts import NO_SETUP, Assertion, assertion
from sfpo_megatron.rewards.dataset_tests import own_form
from sfpo_megatron.rewards.setups import BadTest, Setup, setup
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation
from sfpo_megatron.sandbox.interpreter import OUTPUT_BYTES, Trial, TrialResult, run_trials
from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.process import DidNotStart
from sfpo_megatron.types import Json

MEMORY_BYTES = 512 << 20
CHECKS_S = 5.0
"""Time for the conditions of a row, what its setup imports included, once the program has ended."""
_MOST_CHARS = 16 << 20
"""Characters of a row's tests: a process that scores writes 64 MiB to a file and no more."""
_MOST_ASKED = 8 << 20
"""Characters of a response's values: all of them are parsed."""
_FENCE = re.compile(r"^([ \t]*)(`{3,})[ \t]*(\w*)", re.MULTILINE)
_DEEPER = 3
"""Columns by which a fence may stand deeper than the one that it closes (CommonMark): those in a
docstring stand deeper, and close nothing."""
_LABELS = ("", "python", "python3", "py")
_WORDS = re.compile(r"\s+|\S+")
_NUMBER = re.compile(r"[-+]?(\d+(?:\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_RELATIVE, _ABSOLUTE = 1e-9, 1e-6
_EXPECTED = 'a JSON list of {"input": TEXT, "output": TEXT}, {"setup": TEXT} and assert lines'


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


def program_of(text: str, tests: Sequence[Test]) -> str | None:
    """The last fenced block of Python that is closed, else the last without a name, which may be
    what a program prints; without the margin of its fence. A block that defines less of what the
    tests call than one before it, which shows how that is used, is none. None where there is none.
    """
    found = _blocks(text, _DEEPER) or _blocks(text, len(text))
    blocks = found.get(True) or found.get(False, [])
    names = {name for test in tests if isinstance(test, Assertion) for name in test.names}
    return max(reversed(blocks), key=lambda block: _num_defined(block, names), default=None)


def _blocks(text: str, deeper: int) -> dict[bool, list[str]]:
    """Blocks that are closed, by a fence at most `deeper` columns behind their own, by whether they
    are named as Python; without the margin of their fence."""
    found, opened = dict[bool, list[str]](), None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif _closes(fence, opened, deeper):
            margin, _, label = opened.groups()
            if label.lower() in _LABELS:
                block = text[text.find("\n", opened.end()) + 1 : fence.start()]
                indent = rf"^[ \t]{{0,{len(margin)}}}"
                stripped = re.sub(indent, "", block, flags=re.MULTILINE)
                found.setdefault(label != "", []).append(stripped)
            opened = None
    return found


def _closes(fence: re.Match[str], opened: re.Match[str], deeper: int) -> bool:
    column, own = (len(one[1].expandtabs(4)) for one in (fence, opened))
    return not fence[3] and len(fence[2]) >= len(opened[2]) and column <= own + deeper


def _num_defined(block: str, names: Iterable[str]) -> int:
    """How many of the names it defines at its top level, by its text: it may be no Python."""
    found = (
        re.search(
            rf"^(?:(?:async +)?def|class) +{name}\b|^{name} *(?::[^=\n]*)?=(?!=)", block, re.M
        )
        for name in map(re.escape, names)
    )
    return sum(one is not None for one in found)


def tests_of(answer: str) -> list[Test]:
    """The tests of a row; BadTest for what are none."""
    try:
        items = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise BadTest(f"found no JSON ({error}), expected {_EXPECTED}") from None
    if len(answer) > _MOST_CHARS:
        raise BadTest(f"found {len(answer):,} characters, expected {_MOST_CHARS:,} or fewer")
    items = own_form(items)
    if not isinstance(items, list) or not items:
        raise BadTest(f"found no list with tests, expected {_EXPECTED}")
    shared = setup(_code(items, "setup"), _code(items, "before"))
    code = ({"setup"}, {"before"})
    tests = [item for item in items if not (isinstance(item, dict) and item.keys() in code)]
    if not tests:
        raise BadTest(f"found no tests, expected {_EXPECTED}")
    return [_test(number, item, shared) for number, item in enumerate(tests)]


def _code(items: list[Json], kind: str) -> str:
    """All code of this kind among the items of a row."""
    found = [item[kind] for item in items if isinstance(item, dict) and item.keys() == {kind}]
    texts = [code for code in found if isinstance(code, str)]
    if len(texts) < len(found):
        raise BadTest(f"found a {kind} that is no text, expected {_EXPECTED}")
    return "\n".join(texts)


def _test(number: int, item: Json, shared: Setup) -> Test:
    if isinstance(item, str):
        try:
            return assertion(item, shared)
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
    code = program_of(visible(response, thinking), tests)
    return 0.0 if code is None else sum(passed(code, tests, timeout_s)) / len(tests)


def passed(code: str, tests: list[Test], timeout_s: float) -> list[bool]:
    """Whether the program passes each of the tests."""
    shared = next((test.setup for test in tests if isinstance(test, Assertion)), NO_SETUP)
    _check(shared)
    results = _tried(code, list(map(_trial, tests)), timeout_s, 4 * _longest_output(tests))
    verdicts = [False] * len(tests)
    checks: dict[int, str] = {}
    modules, room = set[str](), _MOST_ASKED
    for number, (test, result) in enumerate(zip(tests, results, strict=False)):
        if isinstance(test, Script):
            verdicts[number] = result.status == 0 and _same(result.output, test.stdout)
            continue
        num_chars = sum(len(value) for value in result.values if value is not None)
        if num_chars <= room and (check := test.on(result.values)) is not None:
            room -= num_chars
            checks[number] = f"bool({check})"
            modules.update(test.modules)
    asked = Trial(expressions=tuple(checks.values()), modules=tuple(modules))
    for number, holds in zip(checks, _hold(asked, shared), strict=True):
        verdicts[number] = holds
    return verdicts


@lru_cache(maxsize=1024)
def _check(shared: Setup) -> None:
    """CannotBeJudged if a row's setup raises by itself, as it would behind any program."""
    trials = [Trial(expressions=("True",), imports=shared.modules)] if shared.own else []
    for result in _tried(shared.own, trials, CHECKS_S):
        if result.status:
            raise CannotBeJudged(f"a row's setup raises where no program is:\n{shared.own}")


def _trial(test: Test) -> Trial:
    if isinstance(test, Script):
        return Trial(stdin=test.stdin)
    return Trial(
        expressions=test.expressions,
        before=test.setup.before,
        setup=test.setup.code,
        modules=test.modules,
        imports=test.setup.modules,
    )


def _longest_output(tests: list[Test]) -> int:
    return max((len(test.stdout) for test in tests if isinstance(test, Script)), default=0)


def _hold(asked: Trial, shared: Setup) -> list[bool]:
    """Which conditions hold, where no program has been. All in one trial; one by one where that
    does not end, so that a value which takes for ever spoils its own."""
    if not asked.expressions:
        return []
    asked = replace(asked, imports=shared.modules)
    for together in _tried(shared.own, [asked], CHECKS_S):
        if together.status == 0:
            return [value == "True" for value in together.values]
    alone = [replace(asked, expressions=(one,)) for one in asked.expressions]
    results = _tried(shared.own, alone, CHECKS_S)
    # A request of its own: what is asked has values of the program in it, which decide no more.
    if not results and not _tried(shared.own, [replace(asked, expressions=("True",))], CHECKS_S):
        raise CannotBeJudged(f"a row's setup takes longer than {CHECKS_S:g} s:\n{shared.own}")
    holds = [result.values == ("True",) for result in results]
    return holds + [False] * (len(asked.expressions) - len(holds))


def _tried(
    code: str, trials: list[Trial], timeout_s: float, output_bytes: int = 0
) -> list[TrialResult]:
    if not trials:
        return []
    try:
        return _run(code, trials, timeout_s, output_bytes)
    except (DidNotStart, OSError) as error:
        print(f"a program could not be tried: {error}; once more")
    # What the machine cannot do now, it cannot do for the smallest program either.
    try:
        _run("", [Trial()], timeout_s)
    except (DidNotStart, OSError) as error:
        raise CannotBeJudged(f"programs cannot be tried on this machine now: {error}") from error
    try:
        return _run(code, trials, timeout_s, output_bytes)
    except (DidNotStart, OSError) as error:
        print(f"this program cannot be tried, and others can: {error}")
        return []


def _run(
    code: str, trials: list[Trial], timeout_s: float, output_bytes: int = 0
) -> list[TrialResult]:
    before = _children()
    try:
        return run_trials(
            code,
            trials,
            timeout_s=timeout_s,
            memory_bytes=MEMORY_BYTES,
            output_bytes=max(OUTPUT_BYTES, output_bytes),
        )
    finally:
        for pid in _children() - before:
            send_signal(pid, signal.SIGKILL)


def _children() -> set[int]:
    """What a program may leave behind where it has no list of processes of its own."""
    return set() if isolation().processes else set(descendants(os.getpid()))


def _same(found: str, wanted: str) -> bool:
    """Equal but for spaces at the ends of lines, empty lines at the end, and how decimals are
    written and rounded."""
    found_lines, wanted_lines = _lines(found), _lines(wanted)
    return len(found_lines) == len(wanted_lines) and all(map(_alike, found_lines, wanted_lines))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]  # a form feed ends no line


def _alike(found: str, wanted: str) -> bool:
    if found == wanted or "." not in wanted:
        return found == wanted
    pairs = zip_longest(_WORDS.findall(found), _WORDS.findall(wanted), fillvalue="")
    return all(one == other or _is_close(one, other) for one, other in pairs)


def _is_close(found: str, wanted: str) -> bool:
    return (
        "." in wanted
        and all(_NUMBER.fullmatch(word) for word in (found, wanted))
        and math.isclose(float(found), float(wanted), rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    )


def explain(
    response: str, prompt: Problem, *, thinking: str = STRIP, timeout_s: float = 2.0
) -> Explanation:
    """The program, and what each test says of it."""
    tests = tests_of(prompt.answer)
    code = program_of(visible(response, thinking), tests)
    read = []
    if code is not None:
        verdicts = passed(code, tests, timeout_s)
        read = [f"test {n}: {'passed' if ok else 'failed'}" for n, ok in enumerate(verdicts)]
    return {"found": code, "read": read, "reference": prompt.answer, "reference_read": []}


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    try:
        tests_of(answer)
    except BadTest as error:
        return f"answer: {error}"
    return None
