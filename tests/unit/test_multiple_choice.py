"""What a response chooses of options: letters taken back, texts that end in a letter."""

from __future__ import annotations

import pytest
from made.problems import problem

from sfpo_megatron.rewards import multiple_choice

VITAMINS = ["Vitamin A", "Vitamin C", "Vitamin D", "Both A and B"]


@pytest.mark.parametrize(
    "response",
    [
        "The correct answer is A rather than option B",
        "The answer is C, not option B.",
        "Option (B) is incorrect.",
        "(B) is wrong.",
        "The wrong choice is B.",
        "The answer cannot be option B.",
        "I do not think the answer is (B)",
        "A. foo B. bar",
    ],
)
def test_a_letter_that_is_taken_back_is_not_chosen(response: str) -> None:
    assert multiple_choice.score(response, problem("B")) == 0


@pytest.mark.parametrize(
    "response",
    [
        "It is not A, so the answer is B.",
        "The answer is option B",
        "The correct option is B.",
        "The answer: (B)",
        "The answer must be B.",
        "(B) Vitamin C.",
    ],
)
def test_a_letter_beside_others_is_chosen(response: str) -> None:
    assert multiple_choice.score(response, problem("B")) == 1


@pytest.mark.parametrize(
    ("response", "letter", "right"),
    [
        ("The answer is (B) Vitamin C.", "B", True),
        ("**B. Vitamin C**", "B", True),
        ("\\boxed{B. Vitamin C}", "B", True),
        ("D. Both A and B", "D", True),
        ("The answer is (A) Vitamin C.", "B", False),
        ("B. Vitamin A", "B", False),
        ("(A) or (B)", "B", False),
    ],
)
def test_the_text_of_an_option_may_end_in_a_letter(response: str, letter: str, right: bool) -> None:
    assert multiple_choice.score(response, problem(letter, choices=VITAMINS)) == right


@pytest.mark.parametrize(
    ("response", "letter", "right"),
    [
        ("A. Type I", "A", True),
        ("C. Hepatitis B", "C", True),
        ("B. 5 N", "B", True),
        ("(A) and (B)", "A", False),
        ("(A) x, (C) y", "A", False),
        ("(A) B", "A", False),
        ("(A)/(B)", "A", False),
    ],
)
def test_a_text_that_the_row_does_not_have(response: str, letter: str, right: bool) -> None:
    assert multiple_choice.score(response, problem(letter)) == right
