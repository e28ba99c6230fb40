r"""Hostile answers, in this process and through the real pool: refused unread, or ended in time.

Not exercised: how many verdicts a second are left (benchmarks/rewards.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.rewards import math
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem

PROBLEM = WireProblem(id="p", question="?", answer="42", metadata={})

HUGE = {
    "tower": "9^{9^{9^9}}",
    "tower without braces": "9^9^9^9^9",
    "tower of variables": "x^{x^{x^{x^{x^{x}}}}}",
    "tower of e": "e^{e^{e^{e^{9}}}}",
    "power of 1": "1^{9^{9^{9}}}",
    "exponent": "2^{999999999}",
    "double star": "2**999999999",
    "scientific": "1e999999999",
    "negative exponent": r"\frac{1}{10^{99999999}}",
    "nested factorials": "(((9!)!)!)!",
    "factorial": "99999999!",
    "factorials in a row": "9!!!!!!!!",
    "binomial": r"\binom{99999999}{44444444}",
    "digits": "7" * 5000,
    "product of powers": "*".join(["9^{5000}"] * 400),
    "deep": "(" * 10_000 + "42" + ")" * 10_000,
    "not quite too deep": "{" * 190 + "41" + "}" * 190,
    "fractions in fractions": r"\frac{1}{" * 3000 + "2" + "}" * 3000,
    "roots in roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "long": "1+" * 500_000 + "1",
    "commas": "1," * 4900,
    "signs of both": r"\pm " * 400 + "1",
    "not quite both": r"5 \pmod" * 200,
    "bars": "|" * 4000,
    "fonts": r"\text{" * 1500 + "1" + "}" * 1500,
    "spaces": " " * 9000 + "41",
    "minus": "-" * 5000 + "41",
    "letters": "abc" * 2500,
    "backslashes": "\\" * 8001,
    "equals": "=".join(["41"] * 2000),
    "dots": "." * 9000,
    "percent": "%" * 9000,
    "carets": "^" * 9000,
    "dollars": r"\$" * 4000,
    "units": "1 " + "cm " * 2500,
    "thousands": "1" + ",000" * 2400,
    "list of thousands": ",".join(["111"] * 2400),
    "names": "x=" * 2000 + "1",
    "names of names": "a=b=c=" * 700 + "1",
    "fonts that are not closed": r"	ext{" * 1500,
    "colours": r"\color{red}" * 800 + "41",
    "sets by a condition": r"\{x|" * 50 + "x>1" + r"\}" * 50,
    "quotes": '"' * 9000,
    "millions": "5 " + "million " * 1000,
}
CODE = {
    "import": "__import__('os').system('true')",
    "lambda": "lambda x: 42",
    "dunder": "().__class__.__bases__[0].__subclasses__()",
    "eval": "eval('42')",
    "exec": "exec('raise SystemExit')",
    "open": "open('/etc/passwd')",
    "exit": "exit()",
    "sympify": "Symbol('x').subs(x, 42)",
    "latex input": r"\input{/etc/passwd}",
    "latex write": r"\write18{true}",
}
ODD = {
    "NUL": "42\0",
    "NUL alone": "\0",
    "surrogate": "\ud83d",
    "replacement": b"\xff\xfe42".decode(errors="replace"),
    "surrogate escape": b"\xff42".decode(errors="surrogateescape"),
    "right to left": "\u202e24",
    "newlines": "4\n2",
    "nothing": "",
    "a brace": "}",
    "nan": "nan",
    "zoo": r"\frac{42}{0}",
    "zero to the minus": "0^{-1}",
    "oo minus oo": r"\infty-\infty",
    "log of 0": r"\ln 0",
    "root of nothing": r"\sqrt",
    "cut off": r"\frac{4",
}
ALL = HUGE | CODE | ODD


@pytest.mark.parametrize("name", HUGE | CODE)
def test_nothing_huge_is_computed_and_nothing_is_run(name: str) -> None:
    """In this process: what would not end, hangs or kills the test."""
    assert math.score(f"\\boxed{{{ALL[name]}}}", PROBLEM) == 0
    with_reference = WireProblem(id="p", question="?", answer="x^2 + 1", metadata={})
    assert math.score(f"\\boxed{{{ALL[name]}}}", with_reference) == 0


@pytest.mark.parametrize(
    "name",
    [
        *("tower of variables", "exponent", "double star", "scientific", "negative exponent"),
        *("nested factorials", "factorial", "factorials in a row", "binomial", "digits", "deep"),
        *("fractions in fractions", "long", "import", "lambda", "dunder", "eval", "exec", "NUL"),
    ],
)
def test_the_screen_says_why(name: str) -> None:
    assert refused(ALL[name])


@pytest.mark.parametrize(
    "answer",
    [
        *("42", r"2^{2^{10}}", "100!", r"\binom{100}{50}", "x^2y^3z^4w^5", "9" * 900),
        *(r"e^{e^{x}}", "(((1+2)+3)+4)", "1,000,000", "10^{9999}", "important", "evaluate"),
        *(r"\lambda", r"\lambda: 3", "x_1 + x_2", "n! (n-1)!"),
    ],
)
def test_what_people_write_is_read(answer: str) -> None:
    assert refused(answer) is None


@pytest.fixture(scope="module")
def pool() -> Iterator[ScoringPool]:
    with ScoringPool(RewardConfig(function="math", timeout_s=3.0)) as opened:
        yield opened


def test_hostile_answers_in_the_pool(pool: ScoringPool) -> None:
    """All of them in one batch, each between two right answers, which are scored."""
    right = (PROBLEM, r"\boxed{42}")
    items = [right]
    for answer in ALL.values():
        items += [(PROBLEM, f"\\boxed{{{answer}}}"), right]
    items += [(PROBLEM, "\\boxed{" * 100_000), right, (PROBLEM, "<think>" * 100_000), right]
    pids = pool.worker_pids
    scores = pool.score(items)
    assert [score.reward for score in scores[::2]] == [1.0] * len(scores[::2])
    assert [name for name, s in zip(ALL, scores[1::2], strict=False) if s.reward] == []
    assert not any(score.timed_out for score in scores)
    assert pool.worker_pids == pids, "one of them has ended its process"


def test_what_only_the_time_limit_ends(pool: ScoringPool) -> None:
    """An integral without a closed form: its worker is replaced, and the next answer scored."""
    endless = r"\boxed{\int_0^1 \frac{\sqrt{x^5+x+1} \sin(x)}{\ln(2+x^3)} dx}"
    pids = pool.worker_pids
    scores = pool.score([(PROBLEM, endless), (PROBLEM, r"\boxed{42}")])
    assert [score.reward for score in scores] == [0.0, 1.0]
    assert scores[0].timed_out and pool.worker_pids != pids
