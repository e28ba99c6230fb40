r"""Which part of a response is judged (`reward.thinking`), boxes, and the smaller text rewards."""

from __future__ import annotations

import pytest
from made.problems import problem

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.plugins import REWARD
from sfpo_megatron.rewards import (
    exact_match,
    last_number,
    math,
    math_boxed,
    multiple_choice,
    tagged_answer,
)
from sfpo_megatron.rewards import format as form
from sfpo_megatron.rewards.boxes import boxes
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.thinking import visible


@pytest.mark.parametrize(
    ("choices", "letters"),
    [
        (["x", "y"], "A, B"),
        ({"a": "x", "b": "y"}, "A, B"),
        ({"label": ["a", "b"], "text": ["x", "y"]}, "A, B"),
        ({"label": ["1", "2"], "text": ["x", "y"]}, "1, 2"),
    ],
)
def test_multiple_choice_refuses_a_letter_that_no_option_has(choices: object, letters: str) -> None:
    prompt = problem("C", choices=choices)
    expected = rf"found 'C', expected one of the row's `choices` \({letters}\)"
    with pytest.raises(ValueError, match=expected):
        multiple_choice.score("C", prompt)
    assert "expected one of the row's `choices`" in (multiple_choice.scorable(prompt) or "")
    assert multiple_choice.scorable(problem(letters[-1], choices=choices)) is None


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The answer is **B**.", True),
        ("The correct answer is **B**.", True),
        ("The answer is **(B)**.", True),
        ("The correct option is **B)**.", True),
        ("The answer is **B. Paris**.", True),
        ("Therefore, the answer is **(B) Paris**.", True),
        ("**Answer**: **(B)** Paris", True),
        ("**B.** Paris", True),
        ("The answer is **Paris**.", True),
        ("The answer is **A**.", False),
        ("The answer is **A** or **B**.", False),
        ("The answer is **(B) Rome**.", False),
        ("**A**, not **B**", False),
    ],
)
def test_multiple_choice_in_bold(response: str, right: bool) -> None:
    prompt = problem("B", choices=["Rome", "Paris", "Oslo"])
    assert multiple_choice.score(response, prompt) == right
    power = problem("A", choices=["2**3", "3**2"])
    assert multiple_choice.score("The answer is 2**3.", power) == 1


def test_a_number_is_an_option_s_text_and_no_index() -> None:
    numbers = problem("1", choices=["1", "2", "3", "4"])
    assert multiple_choice.score("A", numbers) == multiple_choice.score("1", numbers) == 1
    assert multiple_choice.score("B", numbers) == 0
    assert multiple_choice.scorable(problem("1", choices=["x", "y"])) is not None


@pytest.mark.parametrize(
    ("response", "strip", "require_closed"),
    [
        ("a", "a", ""),
        ("<think>a</think>b", "b", "b"),
        ("a</think>b", "b", "b"),
        ("<think>a", "", ""),
        ("a<think>b", "a", ""),
        ("<think>a</think>b<think>c</think>d", "bd", "bd"),
        ("<think>a</think>b<think>c", "b", "b"),
        ("<think><think>a</think>b</think>c", "c", "c"),
        ("<think>a<think>b</think>c", "c", "c"),
        ("<THINK>a</Think>b", "b", "b"),
        ("<thinking>a</thinking>b", "b", "b"),
        ("", "", ""),
        ("1 < 2 <thinks> </", "1 < 2 <thinks> </", ""),
        ("<think>" * 1000, "", ""),
    ],
)
def test_what_of_a_response_is_judged(response: str, strip: str, require_closed: str) -> None:
    assert visible(response) == visible(response, "strip") == strip
    assert visible(response, "require_closed") == require_closed
    assert visible(response, "ignore") == response


RIGHT = {
    exact_match: "42",
    last_number: "42",
    math: r"\boxed{42}",
    math_boxed: r"\boxed{42}",
    tagged_answer: "<answer>42</answer>",
}


@pytest.mark.parametrize("reward", RIGHT)
def test_every_text_reward_leaves_the_thinking_out(reward) -> None:
    right = RIGHT[reward]
    for response, strip, closed, ignored in (
        (right, 1, 0, 1),
        (f"<think>hm</think>{right}", 1, 1, reward is not exact_match),
        (f"<think>{right}", 0, 0, reward is not exact_match),
        (f"<think>{right}</think>", 0, 0, reward is not exact_match),
    ):
        assert reward.score(response, problem()) == strip, response
        assert reward.score(response, problem(), thinking="require_closed") == closed, response
        assert reward.score(response, problem(), thinking="ignore") == float(ignored), response


@pytest.mark.parametrize(("mode", "reward"), [("strip", 0), ("require_closed", 0), ("ignore", 1)])
def test_the_mode_reaches_the_scoring_process(mode: str, reward: int) -> None:
    config = RewardConfig(function="last_number", thinking=mode)  # type: ignore[arg-type]
    with ScoringPool(config) as pool:
        (thought, said) = pool.score([(problem(), "<think>42"), (problem(), "<think>1</think>42")])
        assert (thought.reward, said.reward) == (reward, 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and \fbox{2}", ["1", "2"]),
        (r"\boxed {42}", ["42"]),
        (r"\boxed 42.", ["42"]),
        (r"\boxed 3.5, then", ["3.5"]),
        (r"\boxed\pi", [r"\pi"]),
        (r"\boxed{\{1}", [r"\{1"]),
        (r"\boxed{a\\{b}}", [r"a\\{b}"]),
        (r"\boxed{1} \boxed{2", ["1"]),
        (r"\boxed{x = \boxed{5}}", [r"x = \boxed{5}", "5"]),
        (r"\boxedfoo{1}", []),
        (r"\boxed{" * 5000, []),
        (r"\boxed{" + "1" * 20_000 + "}", []),
        (r"\boxed{1}" * 1000, ["1"] * 64),
    ],
)
def test_boxes(text: str, found: list[str]) -> None:
    assert boxes(text) == found


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("0.5", ".5", 1),
        ("5", ".5", 0),
        ("-0.5", "-.5", 1),
        ("0.25", "p = .25.", 1),
        ("-5", "\u22125", 1),
        ("5", "\u22125", 0),
        ("-5", "it is \u22125.0", 1),
        ("2", "5\u22122", 1),  # a difference, not a sign
        ("0.0000001", "1e-7", 1),
        ("1e-7", "0.0000001", 1),
        ("7", "1e-7", 0),
        ("1e-7", "1e-7.", 1),
        ("2500", "2.5E3", 1),
        ("7", "x1e7y 7", 1),
        ("1234.5", "1,234.5", 1),
        ("1234567", "$1,234,567.", 1),
        ("50", "50%", 1),
        ("50%", "50 %.", 1),
        ("0.5", "50%", 0),
        ("3", "version 1.2.3", 1),
        ("5", "..5", 1),
        ("5", "Answer: \uff15", 1),
        ("1234", r"1{,}234", 1),
        ("234", r"1{,}234", 0),
        ("1234", r"$1\,234$", 1),
        ("1234", "1\u202f234", 1),
        ("1234", "1'234", 1),
        ("-5", r"-\$5", 1),
        ("5", r"-\$5", 0),
        ("5", r"10-\$5", 1),
    ],
)
def test_last_number_reads(answer: str, response: str, right: int) -> None:
    assert last_number.score(response, problem(answer)) == right


@pytest.mark.parametrize(
    "answer",
    [
        "1/2",
        r"\frac{1}{2}",
        "x^2",
        "10^3",
        r"2\pi",
        r"\sqrt{2}",
        r"3\sqrt2",
        "7:30",
        "2516_8",
        "5 m^2",
    ],
)
def test_a_part_of_something_else_is_no_reference_of_last_number(answer: str) -> None:
    assert last_number.readable(answer) is not None
    with pytest.raises(ValueError, match=r"use reward\.function=math"):
        last_number.score("2", problem(answer))


@pytest.mark.parametrize(
    "answer",
    [
        r"\boxed{42}",
        "$42$",
        "#### 42",
        "42 km/h",
        "$42/hour",
        r"42^\circ",
        "42%",
        "x = 42!",
        "(1, 42)",
    ],
)
def test_what_surrounds_a_number_does_not_refuse_a_reference(answer: str) -> None:
    assert last_number.readable(answer) is None
    assert last_number.score("42", problem(answer)) == 1


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("42", "<answer>42</answer>", 1),
        ("42", "<answer> 42.0\n</answer> bye", 1),
        ("42", r"<answer>\boxed{42}</answer>", 1),
        (r"\frac12", "<answer>0.5</answer>", 1),
        ("<answer>42</answer>", "<answer>42</answer>", 1),
        ("a b == c", "<answer>a b == c</answer>", 1),
        ("42", "42", 0),
        ("42", "<answer>43</answer>", 0),
        ("42", "<answer>42</answer><answer>43</answer>", 0),
        ("42", "<answer>42, 43</answer>", 0),
        ("42", "<answer></answer>", 0),
        ("42", "<answer>42", 0),
        ("42", "</answer>42<answer>", 0),
        ("listen", "<answer>silent</answer>", 0),
    ],
)
def test_tagged_answer(answer: str, response: str, right: int) -> None:
    assert tagged_answer.score(response, problem(answer)) == right


def test_a_worked_solution_as_a_tagged_reference() -> None:
    """GSM8K's and MATH's: said to be read as it is compared."""
    for answer, read in (("48/2 is 24.\n#### 72", "72"), (r"$x$, so \boxed{\frac12}.", "1/2")):
        right = f"<answer>{read}</answer>"
        assert tagged_answer.score(right, problem(answer)) == 1
        assert tagged_answer.explain(right, problem(answer))["reference_read"] == [read]
    assert tagged_answer.explain("", problem("$ $"))["reference_read"] == []


CHOICES = ["12", "24", "36 cm", r"\frac{1}{2}", "none of these"]


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("E", "E", 1),
        ("E", "(E)", 1),
        ("(E)", "e)", 1),
        ("E", "The answer is E.", 1),
        ("E", "Answer: **E**", 1),
        ("E", "**E**", 1),
        ("E", "**D**", 0),
        ("E", r"so \boxed{\text{(E)}}", 1),
        ("E", "<answer>E</answer>", 1),
        ("E", "hm, A is wrong.\nAnswer: (E) none of these", 1),
        ("E", r"\boxed{E. 42}", 1),
        ("E", "option E", 1),
        ("E. 42", "42", 1),
        ("E. 42", "E. 41", 0),
        ("E. 42", "D. 42", 0),
        ("E", "D", 0),
        ("E", "D or E", 0),
        ("E", "A, B, C, D, E", 0),
        ("E", "A) 1 E) 2", 0),
        ("E", "An egg", 0),
        ("A", "A dog", 0),
        ("E", "e", 0),
        ("E", "", 0),
        ("E", "Answer: A. Answer: E", 1),
    ],
)
def test_multiple_choice(answer: str, response: str, right: int) -> None:
    assert multiple_choice.score(response, problem(answer)) == right


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("B", "24", 1),
        ("24", "B", 1),
        ("24", "(B) 24", 1),
        ("24", "(B) 12", 0),
        ("B", "12", 0),
        ("D", r"\boxed{\dfrac{1}{2}}", 1),
        ("E", "None of these.", 1),
        ("C", "36 cm", 1),
    ],
)
@pytest.mark.parametrize(
    "choices",
    [
        CHOICES,
        dict(zip("ABCDE", CHOICES, strict=True)),
        {"label": list("ABCDE"), "text": CHOICES},
    ],
    ids=["list", "by letter", "label and text"],
)
def test_multiple_choice_knows_the_row_s_options(
    answer: str, response: str, right: int, choices: object
) -> None:
    assert multiple_choice.score(response, problem(answer, choices=choices)) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        *[("2", 1), ("(2)", 1), ("2. y", 1), ("The answer is 2.", 1), ("y", 1)],
        *[("1", 0), ("2. x", 0), ("2 or 3", 0), ("x", 0), ("B", 0)],
    ],
)
def test_multiple_choice_with_numbers_for_labels(response: str, right: int) -> None:
    """Some rows of ARC have them."""
    choices = {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}
    assert multiple_choice.score(response, problem("2", choices=choices)) == right


def test_multiple_choice_refuses_a_reference_that_is_no_option() -> None:
    with pytest.raises(ValueError, match="expected the letter of an option"):
        multiple_choice.score("E", problem("forty-two"))


@pytest.mark.parametrize(
    ("response", "strip", "require_closed"),
    [
        (r"\boxed{42}", 1, 0),
        ("<answer>42</answer>", 1, 0),
        (r"<think>hm</think> so \boxed{42}", 1, 1),
        (r"hm</think> so \boxed{42}", 1, 1),
        (r"<think>hm</think><answer>\boxed{42}</answer>", 1, 1),
        (r"<think>\boxed{1}</think>\boxed{42}", 1, 1),
        ("42", 0, 0),
        (r"\boxed{}", 0, 0),
        ("<answer> </answer>", 0, 0),
        (r"\boxed{1}\boxed{2}", 0, 0),
        ("<answer>1</answer><answer>2</answer>", 0, 0),
        ("<answer>1", 0, 0),
        (r"<think>hm \boxed{42}", 0, 0),
        (r"<think>a</think><think>b</think>\boxed{42}", 0, 0),
        (r"so <think>a</think>\boxed{42}", 0, 0),
        (r"\boxed{42", 0, 0),
        (r"<answer>1</answer>\boxed{2}", 0, 0),
        (r"\boxed{2}<answer>1</answer>", 0, 0),
        (r"\boxed{<answer>1</answer>}", 1, 0),
        (r"[THINK]hm[/THINK]\boxed{42}", 1, 1),
        (r"[THINK]hm \boxed{42}", 0, 0),
        ("", 0, 0),
    ],
)
def test_format(response: str, strip: int, require_closed: int) -> None:
    assert form.score(response, problem()) == strip
    assert form.score(response, problem("7")) == strip, "the answer does not count"
    assert form.score(response, problem(), thinking="require_closed") == require_closed


@pytest.mark.parametrize(
    ("reward", "good", "bad"),
    [
        (math, r"\frac12", ""),
        (math, "Yes", " "),
        (last_number, "7", "none"),
        (multiple_choice, "E. 42", "forty-two"),
        (tagged_answer, "x", " "),
    ],
)
def test_which_references_can_be_read(reward, good: str, bad: str) -> None:
    assert reward.readable(good) is None
    assert "answer: found" in reward.readable(bad)


def test_the_built_in_names() -> None:
    names = {"multiple_choice", "tagged_answer", "format", "math", "last_number", "exact_match"}
    assert names <= set(REWARD.built_in)
