r"""The `math` verifiers: what equals what, what a box is, hostile answers in the pool."""

from __future__ import annotations

import time

import pytest
from made.problems import problem

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.rewards import math, math_boxed
from sfpo_megatron.rewards.math import last_boxed
from sfpo_megatron.rewards.pool import ScoringPool


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\boxed{", None),
        ("42", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("42", r"\boxed{42}", True),
        ("42", r"\boxed{42.0}", True),
        ("42", r"$\boxed{43}$", False),
        ("42", "the answer is 42", False),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{1/2}", True),
        (r"$\frac{1}{2}$", r"\boxed{\dfrac{2}{4}}", True),
        (r"\boxed{\sqrt{2}}", r"\boxed{\frac{2}{\sqrt{2}}}", True),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", True),
        ("(1, 2)", r"\boxed{(2, 1)}", False),
        ("x^2 + 1", r"\boxed{1 + x^2}", True),
        ("1,000", r"\boxed{1000}", True),
        ("42", r"\boxed{}", False),
    ],
)
def test_equality(answer: str, response: str, right: bool) -> None:
    assert math.score(response, problem(answer)) == float(right)
    boxed = last_boxed(response) is not None
    assert math_boxed.score(response, problem(answer)) == (1.0 if right else 0.1 * boxed)


def test_a_reference_that_is_none() -> None:
    with pytest.raises(ValueError, match="expected a number or an expression"):
        math.score(r"\boxed{1}", problem(""))


def test_hostile_answers_in_the_pool() -> None:
    """A tower of powers costs its time limit and gets 0; the next response is scored."""
    with ScoringPool(RewardConfig(function="math", timeout_s=1.0)) as pool:
        begun = time.monotonic()
        responses = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{42}", r"\boxed{" * 2000]
        scores = pool.score([(problem("42"), text) for text in responses])
        assert [score.reward for score in scores] == [0.0, 1.0, 0.0]
        assert time.monotonic() - begun < 30
