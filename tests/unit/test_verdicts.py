r"""`math` on a table of references and responses: the verdict of each, with its reason.

verdicts.jsonl: reference, response, verdict, reason, and math-verify's own verdict (null for what
it is not given). Where they differ the row's reason says why ours is right; `pytest -s -k
difference` prints those rows. Not exercised: the scoring process (test_verdicts_hostile.py).
"""

from __future__ import annotations

import collections
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.rewards import math
from sfpo_megatron.rewards.wire import WireProblem

TABLE = Path(__file__).with_name("verdicts.jsonl")
CASES: list[dict[str, Any]] = [
    json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()
]


def verdict(reference: str, response: str) -> float:
    return math.score(response, WireProblem(id="p", question="?", answer=reference, metadata={}))


def test_every_verdict_of_the_table() -> None:
    assert len(CASES) >= 400
    assert len({(case["reference"], case["response"]) for case in CASES}) == len(CASES)
    wrong = [
        case for case in CASES if verdict(case["reference"], case["response"]) != case["verdict"]
    ]
    assert not wrong, "\n".join(f"{case}" for case in wrong)


def test_a_right_answer_is_right_whatever_surrounds_it() -> None:
    """Every reference equals itself, and stands at the end of a worked answer."""
    for reference in dict.fromkeys(case["reference"] for case in CASES):
        final = reference.rpartition("####")[2]  # of a worked solution
        answer = reference if "\\boxed" in reference else f"\\boxed{{{final}}}"
        assert verdict(reference, answer) == 1, reference
        assert verdict(reference, f"<think>\\boxed{{0}}</think>\nSo $x$:\n\\[{answer}\\]") == 1, (
            answer
        )


def with_math_verify(case: dict[str, Any]) -> int:
    from math_verify import parse, verify

    gold = (
        case["reference"] if "\\boxed" in case["reference"] else f"\\boxed{{{case['reference']}}}"
    )
    try:
        return int(
            verify(
                parse(gold, parsing_timeout=5),
                parse(case["response"], parsing_timeout=5),
                timeout_seconds=5,
            )
        )
    except Exception:
        return 0


def agrees_with_the_table(cases: list[dict[str, Any]]) -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    found = [(case, with_math_verify(case)) for case in cases]
    changed = [case for case, value in found if value != case["math_verify"]]
    assert not changed, "\n".join(f"{case}" for case in changed)


def test_math_verify_judges_a_sample_as_the_table_says() -> None:
    agrees_with_the_table([case for case in CASES if case["math_verify"] is not None][::40])


@pytest.mark.full
def test_math_verify_judges_all_as_the_table_says() -> None:
    agrees_with_the_table([case for case in CASES if case["math_verify"] is not None])


def test_each_difference_from_math_verify_has_its_reason() -> None:
    judged = [case for case in CASES if case["math_verify"] is not None]
    differing = [case for case in judged if case["math_verify"] != case["verdict"]]
    assert all(case["reason"] for case in CASES)
    counts = collections.Counter(case["reason"] for case in differing)
    print(f"\n{len(judged) - len(differing)} of {len(judged)} as math-verify judges them; others:")
    for reason, count in counts.most_common():
        print(f"\n{reason} ({count})")
        for case in differing:
            if case["reason"] == reason:
                print(
                    f"  {case['reference']}  |  {case['response']}  |  ours {case['verdict']}, "
                    f"math-verify {case['math_verify']}"
                )
    assert 0.7 < 1 - len(differing) / len(judged) < 1
