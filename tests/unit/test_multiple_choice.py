"""What a response chooses of options: letters taken back, texts that end in a letter."""

from __future__ import annotations

import pytest
from made.problems import problem

from sfpo_megatron.rewards import multiple_choice

VITAMINS = ["Vitamin A", "Vitamin C", "Vitamin D", "Both A and B"]
CAPITALS = ["London", "Paris", "Rome", "Berlin"]


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
        "(B) is not the correct answer.",
        "Option B isn't correct.",
        "B is not correct",
        "It is wrong that B is the correct answer.",
        "I doubt that option B is correct.",
        "Neither A nor option B is correct.",
        "not (B)",
        "B is less correct than A",
        "B is correct, but A is more correct",
        "(B) is right, but A is better.",
        "(A) is correct, (B) is not correct.",
        "B, not correct.",
        "The answer is B because, no, wait, it is A.",
        "The answer is B, no: A.",
        "(B) is correct? No.",
        "I would not choose B.",
        "B - Paris, not correct.",
        "B - Paris isn't right.",
        "The answer is B because C is correct",
        "B, since the correct option is C",
        "B, since it is either B or C",
        "B because I am unsure whether it is B, C or D",
        "The answer is (B) Paris, since C is the right answer",
        "A is better than option B.",
        "I chose A over option B",
        "Only A is correct, which refutes option B",
        "This rules out option B.",
        "We can eliminate choice B.",
        "We can eliminate Paris (option B).",
        "We can eliminate Paris, option B.",
        "This contradicts option B.",
        "The worst option is B.",
        "The least likely answer is B",
        "The second-best answer is B.",
        "Another option is B.",
        "A common mistake is choosing option B",
        "It no longer matches option B",
        "The only distractor is option B.",
        "The only bad choice is B.",
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
        "The answer is B because B is correct",
        "B because A is not correct",
        "B, since C is the wrong answer",
        "B, because vitamin C is the right vitamin",
        "The capital is Paris, so option B.",
        "It is Paris (option B).",
        "It must be Paris, option B.",
        "This corresponds to option B",
        "Option A is wrong and option B is right",
        "Eliminating A, C and D leaves option B.",
        "The object least likely to float is option B.",
        "I choose B over A",
        "The answer is most likely B",
        "Therefore, B.",
        "Final Answer: The final answer is B. I hope it is correct.",
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


@pytest.mark.parametrize("choices", [None, CAPITALS])
@pytest.mark.parametrize(
    "said",
    [
        "(B) is the correct answer.",
        "Option B is correct.",
        "Therefore, (B) is correct.",
        "Thus, option B is the right choice.",
        "**B) Paris** is the correct answer.",
        "B. Paris is correct.",
        "[B]",
        "[[B]]",
        "<answer>[B]</answer>",
        "B - Paris",
        "B – Paris",
        "B: Paris",
        "Option (B): Paris",
        r"\boxed{b}",
        "<answer>b</answer>",
        "The answer is: B",
        "Answer: (B)",
        "The answer is therefore B.",
        "The answer is B because Paris is the capital.",
        "The answer is (B) Paris, since Rome is not in France.",
        "The answer is B, not A.",
        "The answer is B rather than option A.",
        "The answer should be B.",
        "Answer：B",
        "I would choose B.",
        "B is the most likely answer.",
        "Only B is correct.",
    ],
)
def test_a_choice_is_said_in_many_ways(said: str, choices: list[str] | None) -> None:
    row = {} if choices is None else {"choices": choices}
    assert multiple_choice.score(said, problem("B", **row)) == 1
    assert multiple_choice.score(said, problem("A", **row)) == 0


@pytest.mark.parametrize(
    "said",
    [
        "option A or option B",
        "Either A or option B is correct.",
        "Both A and B are correct.",
        "A and B is correct",
        "[A] or [B]",
        "[A, B]",
        "B - A",
        "B is correct or A is correct",
        "(A) is correct, or (B) is correct.",
        "B - London",
        "B is London",
        "The answer is a",
        "The answer is b",
    ],
)
def test_two_letters_or_another_s_text_are_no_choice(said: str) -> None:
    row = problem("B", choices=CAPITALS)
    assert multiple_choice.score(said, row) == 0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("The correct answer is B. Paris is the capital of France.", True),
        ("The answer is B) Paris, which is the capital of France.", True),
        ("The answer is B. Paris. It has the Louvre.", True),
        ("The answer is B (Paris).", True),
        ("The answer is option B, Paris.", True),
        ("So the answer is Paris, option B.", True),
        ("Hence the answer is Paris (B).", True),
        ("The answer is B. London is the capital", False),
        ("The answer is B. Paris is not the capital", False),
        ("The answer is B. Paris, or A", False),
        ("The answer is B. Paris. C is right", False),
        ("The answer is B. Paris is smaller than London", False),
        ("The answer is B. Parisian food", False),
        ("The answer is B (London).", False),
        ("The answer is London, option B", False),
        ("The answer is Paris (A)", False),
    ],
)
def test_the_letter_stands_beside_its_own_text(said: str, right: bool) -> None:
    assert multiple_choice.score(said, problem("B", choices=CAPITALS)) == right
    assert multiple_choice.score(said, problem("D", choices=CAPITALS)) == 0


def test_the_text_of_an_option_may_be_a_verdict() -> None:
    statements = ["I", "I is correct", "Only II is correct", "I and not II"]
    assert multiple_choice.score(
        "The correct option is C. Only II is correct.", problem("C", choices=statements)
    )
    assert multiple_choice.score("I is correct", problem("B", choices=statements))
    assert not multiple_choice.score("The answer is I and not II", problem("A", choices=statements))


@pytest.mark.parametrize(
    ("response", "letter", "choices", "right"),
    [
        ("0.5", "B", ["1/4", "1/2", "2"], True),
        (r"\boxed{\frac{1}{2}}", "B", ["1/4", "1/2", "2"], True),
        ("The answer is (B) 0.5", "B", ["1/4", "1/2", "2"], True),
        ("B - 0.5", "B", ["1/4", "1/2", "2"], True),
        ("2.0", "C", ["1/4", "1/2", "2"], True),
        ("B", "0.5", ["1/4", "1/2", "2"], True),
        ("2000", "B", ["$1,000", "$2,000"], True),
        ("10 meters", "B", ["5 m", "10 m"], True),
        ("1 + 2x", "A", ["2x+1", "2x-1"], True),
        ("0.25", "B", ["1/4", "1/2", "2"], False),
        ("B. 0.25", "B", ["1/4", "1/2", "2"], False),
        ("0.5 or 2", "B", ["1/4", "1/2", "2"], False),
        ("-0.5", "B", ["1/4", "1/2", "2"], False),
        ("1/2", "A", ["0.5", "1/2"], False),
        ("0.50", "A", ["0.5", "1/2"], False),
        ("10", "A", ["10 m", "10 cm"], False),
        ("2", "1", {"label": ["1", "2"], "text": ["2 m", "3 m"]}, False),
    ],
)
def test_the_text_of_an_option_may_be_a_number(
    response: str, letter: str, choices: object, right: bool
) -> None:
    assert multiple_choice.score(response, problem(letter, choices=choices)) == right


@pytest.mark.parametrize(
    ("choices", "response", "right"),
    [
        (["BB", "Bb", "bb"], "bb", "C"),
        (["BB", "Bb", "bb"], "Bb", "B"),
        (["BB", "Bb", "bb"], "bB", ""),
        (["BB", "Bb", "bb"], "A. bb", ""),
        (["x", "X"], r"\boxed{x}", "A"),
        ([".5", "5", "50"], "5", "B"),
        ([".5", "5", "50"], ".5", "A"),
        ([".5", "5", "50"], "0.5", "A"),
        (["5 mW", "5 MW"], "5 MW", "B"),
        (["U.S.A.", "U.K."], "U.S.A", "A"),
        (["paris", "rome"], "PARIS.", "A"),
        (["A", "C", "G", "T"], "C", "C"),
        (["A", "C", "G", "T"], "G", "C"),
        (["A", "C", "G", "T"], "B. C", "B"),
    ],
)
def test_a_text_that_is_close_to_another_s_is_that_option_alone(
    choices: list[str], response: str, right: str
) -> None:
    letters = "ABCD"[: len(choices)]
    scored = [multiple_choice.score(response, problem(one, choices=choices)) for one in letters]
    assert scored == [one == right for one in letters]


@pytest.mark.parametrize(
    ("choices", "reference", "letter"),
    [
        (["BB", "Bb", "bb"], "bb", "C"),
        ([".5", "5", "50"], "5", "B"),
        (["A", "C", "G", "T"], "C", "C"),
        (["A", "C", "G", "T"], "T", "D"),
        (["Paris", "Rome"], "rome.", "B"),
    ],
)
def test_a_reference_is_its_label_or_its_own_text(
    choices: list[str], reference: str, letter: str
) -> None:
    assert multiple_choice.score(f"The answer is {letter}", problem(reference, choices=choices))
    others = set("ABCD"[: len(choices)]) - {letter}
    assert not any(
        multiple_choice.score(f"The answer is {one}", problem(reference, choices=choices))
        for one in others
    )


@pytest.mark.parametrize(
    "choices",
    [
        ["A)21", "B)21.5", "C)22"],
        ["(A)21", "(B)21.5", "(C)22"],
        ["A. 21", "B. 21.5", "C. 22"],
        {"a": "a.21", "b": "b.21.5", "c": "c.22"},
    ],
)
@pytest.mark.parametrize(
    "said", ["B", "21.5", r"\boxed{B) 21.5}", "B)21.5", "The answer is (B)21.5", "B. 21.50"]
)
def test_options_may_come_with_their_own_letters(choices: object, said: str) -> None:
    """`options` of AQuA-RAT and AGIEval are such."""
    for reference in ("B", "B)21.5", "21.5"):
        assert multiple_choice.score(said, problem(reference, choices=choices))
    assert not multiple_choice.score(said, problem("A", choices=choices))


def test_a_letter_that_a_text_begins_with_is_its_own_where_not_all_have_theirs() -> None:
    names = ["A. Smith", "C. Jones", "B. Brown"]
    assert multiple_choice.score(r"\boxed{C. Jones}", problem("B", choices=names))
    assert not multiple_choice.score("Smith", problem("A", choices=names))
    numbers = {"label": ["1", "2"], "text": ["1.5", "2.5"]}
    assert multiple_choice.score("1.5", problem("1", choices=numbers))


def test_the_points_of_an_abbreviation_mark_no_letter() -> None:
    states = ["Ohio", "D.C.", "Iowa", "U.S."]
    assert multiple_choice.score("The answer is D.C.", problem("B", choices=states))
    assert not multiple_choice.score("The answer is D.C.", problem("D", choices=states))
    assert not multiple_choice.score("D.C.", problem("D"))
