"""The verifiers themselves, in this process: what is right, what is wrong, what is never raised."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.plugins import REWARD
from sfpo_megatron.rewards import exact_match, last_number, math, reasoning_gym
from sfpo_megatron.rewards.wire import WireProblem


def problem(answer="42", **metadata):
    return WireProblem(id="p", question="6 * 7 =", answer=answer, metadata=metadata)


def gym_problem(task="chain_sum", **args):
    source = DataSource(source="reasoning_gym", task=task, args=args, size=1)
    (row,) = source_rows(source, seed=3, key="k", name=task)
    return WireProblem(id=row.id, question=row.question, answer=row.answer, metadata=row.metadata)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("so 6 * 7 = 42.", 42),
        ("1 + 41 = 42, I think", 42),
        ("minus: -42", -42),
        ("7-3", 3),
        ("x = +5", 5),
        ("(4)-3", 3),
        ("1,234", 1234),
        ("-12,345.60 dollars", -12345.6),
        ("3,4", 4),
        ("the options are 1, 2, 3", 3),
        ("12,34", 34),
        ("3.50", 3.5),
        ("3.5.", 3.5),
        ("007", 7),
        ("no number", None),
        ("", None),
        ("٤٢", 42),
        ("４２", 42),
        ("1{,}234", 1234),
        ("1\\,234", 1234),
        ("1'234", 1234),
        ("1\u202f234", 1234),
        ("-$5", -5),
        ("-\\$5.50", -5.5),
        ("9" * 5000, None),
        # A sign that does not touch its digits.
        ("x = - 5", -5),
        ("- 5", -5),
        ("$-\\,5$", -5),
        ("\\boxed{-{5}}", -5),
        ("so x \u2264 \u2212 5", -5),
        ("**Answer:** - $5", -5),
        ("3 \\cdot - 5", -5),
        ("(3, - 5)", -5),
        ("= + 5", 5),
        ("8 - 5", 5),
        ("$8$ - 5", 5),
        ("\\pi - {5}", 5),
        ("(x + 1) - 5", 5),
        ("the answers are\n- 5", 5),  # of a list
        # A dash, where what stands before it only looks like what a sign stands behind.
        ("<b>Answer</b> - 42", 42),
        ("Total<br> - 42", 42),
        ("Result:\n> - 42", 42),
        (r"We get $20\%$ - 42 dollars", 42),
        ("$5!$ - 120", 120),
        ("x' is $x'$ - 7", 7),
        ("$$x$$ - 42", 42),
        ("C++ - 42", 42),
        ("Answer: <b>- 5</b>", -5),
        ("x > - 5", -5),
        ("20 > - 5", -5),
        ("it is $ - 5$", -5),
        ("$$ - 5$$", -5),
        ("3 + - 5", -5),
        ("45 m^2", 45),
        ("45 \\text{ cm}^{3}", 45),
        ("10^{12}", 12),
    ],
)
def test_last_number(text, number):
    found = last_number.last_number(text)
    assert (found is None) if number is None else (float(found) == number)


@pytest.mark.parametrize("answer", ["Answer: 42", "The result is: 42", "answer:42", "x = 42"])
def test_last_number_takes_a_reference_with_a_lead(answer):
    assert last_number.readable(answer) is None
    assert last_number.score("6 * 7 = 42", problem(answer)) == 1


@pytest.mark.parametrize("answer", ["7:30", "3 : 2", "1/2", "1/ - 2", "x^2", "2\\pi"])
def test_last_number_refuses_a_part_of_something_else(answer):
    assert "a part of something else" in last_number.readable(answer)


def test_last_number_scores():
    assert last_number.score("6 * 7 = 42", problem()) == 1
    assert last_number.score("42.00", problem()) == 1
    assert last_number.score("42 or 43", problem()) == 0
    assert last_number.score("", problem()) == 0
    assert last_number.score("0.30000000000000004", problem("0.3")) == 0
    with pytest.raises(ValueError, match="found 'Paris', expected a number"):
        last_number.score("Paris", problem("Paris"))


def test_exact_match():
    assert exact_match.score(" 42\n", problem()) == 1
    assert exact_match.score("42.", problem()) == 0
    assert exact_match.score("", problem()) == 0


def test_reasoning_gym_scores_with_the_tasks_own_verifier():
    prompt = gym_problem()
    right = prompt.answer
    assert reasoning_gym.score(right, prompt) == 1
    assert reasoning_gym.score(f" {right}.0\n", prompt) == 1  # the task compares decimals
    assert reasoning_gym.score("x", prompt) == 0
    assert 0 < reasoning_gym.score(f"{right}{right}", prompt) < 1  # partial credit is kept
    assert reasoning_gym.score(f"hm 1 <answer> {right} </answer> bye", prompt) == 1
    assert reasoning_gym.score(f"<answer>{right}</answer> <answer>x</answer>", prompt) == 0
    assert reasoning_gym.score("<answer>", prompt) == 0
    # A verifier that reads the entry's metadata, with several right answers.
    countdown = gym_problem("countdown")
    solution = countdown.metadata["entry"]["metadata"]["expression"]
    assert reasoning_gym.score(solution, countdown) == 1
    assert reasoning_gym.score("1 + 1", countdown) < 1


def test_reasoning_gym_refuses_other_prompts():
    with pytest.raises(ValueError, match=r"set reward\.function to exact_match or last_number"):
        reasoning_gym.score("42", problem())


@settings(deadline=None)
@given(st.text())
def test_no_response_makes_a_verifier_raise_or_leave_its_range(response):
    prompts = {"reasoning_gym": GYM_PROBLEM}
    for name, module in (
        ("exact_match", exact_match),
        ("last_number", last_number),
        ("reasoning_gym", reasoning_gym),
    ):
        assert REWARD.load(name) is module.score
        assert 0 <= module.score(response, prompts.get(name, problem())) <= 1


GYM_PROBLEM = gym_problem()

PIECES = st.sampled_from(
    [
        *"\\{}()[]|^_&!'\",.;:%$<=>+-*/0159xei ",
        *["\\frac", "\\text{", "\\pm ", "\\\\", "\\mod ", "\\cup ", "\\circ", " and "],
        *["\\begin{pmatrix}", "\\end{pmatrix}", "\u0305", "\u00bd", "\u0663", "\ud83d"],
    ]
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=20).map("".join))
@example("42\\ ")  # ends in a backslash once its spaces are gone
def test_no_answer_makes_math_raise(answer):
    for reference in ("42", "(1, 2]", r"\frac{x}{2}", "3:2"):
        assert math.score(f"\\boxed{{{answer}}}", problem(reference)) in (0, 1)
    math.readable(answer)


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1,",
        "1.",
        "-",
        "(",
        "<answer>",
        "</answer>",
        "1,2",
        "+1-",
        "1,111",
        "= - {",
        "- ",
        "{ ",
    ],
)
def test_time_is_linear_in_the_response(unit):
    response = unit * (200_000 // len(unit))
    start = time.process_time()
    last_number.score(response, problem())
    reasoning_gym.score(response, GYM_PROBLEM)
    assert time.process_time() - start < 1.0  # quadratic: minutes
