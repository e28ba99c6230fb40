"""The figures of an evaluation against definitions written out: subsets counted, votes by hand."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.evaluation.answers import answer_of
from sfpo_megatron.evaluation.figures import (
    Sample,
    difference,
    figures,
    majority,
    pass_at,
    standard_error,
)


def samples(*verdicts: bool, answers: str | None = None) -> list[Sample]:
    names = [*answers] if answers else ["x" if verdict else "y" for verdict in verdicts]
    return [
        Sample(
            correct=bool(verdict),
            answer=None if answer == "-" else answer,
            num_tokens=4,
            truncated=False,
        )
        for verdict, answer in zip(verdicts, names, strict=True)
    ]


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n in range(1, 8):
        for num_correct in range(n + 1):
            verdicts = [True] * num_correct + [False] * (n - num_correct)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(verdicts, k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at(k, n, num_correct) == pytest.approx(expected, abs=1e-15)


def test_large_n_stays_exact() -> None:
    assert pass_at(512, 1024, 1) == pytest.approx(0.5)
    assert pass_at(1024, 1024, 1) == 1 and pass_at(1024, 1024, 0) == 0


@pytest.mark.parametrize(
    ("verdicts", "answers", "expected"),
    [
        ((1, 1, 0), "aab", 1.0),
        ((0, 0, 1), "bba", 0.0),
        ((1, 0), "ab", 0.5),  # a tie: half of the tied answers are right
        ((1, 0, 0), "abc", 1 / 3),
        ((0, 0, 1), "--a", 1.0),  # those without an answer do not vote
        ((0, 0), "--", 0.0),
        ((0, 1, 1, 0), "aaab", 1.0),  # one text, once with another that makes it wrong
    ],
)
def test_majority(verdicts: tuple[int, ...], answers: str, expected: float) -> None:
    assert majority(samples(*map(bool, verdicts), answers=answers)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("function", "response", "answer"),
    [
        ("math", r"\boxed{1} so \boxed{ 2 }", "2"),
        ("math", "2", None),
        ("multiple_choice", "The answer is (E).", "E"),
        ("multiple_choice", "The answer is E. Paris, because D is a river.", "E"),
        ("multiple_choice", "(e) is the correct answer", "E"),
        ("multiple_choice", r"\boxed{\text{E) 42}}", "E"),
        ("multiple_choice", "<answer>A man</answer>", "Aman"),
        ("multiple_choice", "The answer is Paris", "Paris"),
        ("multiple_choice", r"\boxed{E}", "E"),
        ("multiple_choice", "<think>D</think>", None),
        ("last_number", "1 and 2.0", "2"),
        ("tagged_answer", "<answer> 2 </answer>", "2"),
        ("tagged_answer", "2", None),
    ],
)
def test_what_votes_is_what_its_reward_looks_at(
    function: str, response: str, answer: str | None
) -> None:
    """Else a right answer would have no vote."""
    assert answer_of(RewardConfig(function=function), None, response) == answer


def test_the_standard_error_is_over_problems() -> None:
    """Two problems, of which one is always solved: four or four hundred samples tell no more."""
    for n in (4, 400):
        found = figures({"a": samples(*[True] * n), "b": samples(*[False] * n)})
        assert found.accuracy == 0.5 and found.stderr == pytest.approx(0.5)
    assert math.isnan(figures({"a": samples(True)}).stderr)


def test_figures_of_random_samples() -> None:
    random.seed(0)
    problems = {
        f"p{number}": [
            Sample(
                correct=random.random() < 0.4,
                answer=random.choice("abc"),
                num_tokens=random.randrange(1, 99),
                truncated=random.random() < 0.2,
            )
            for _ in range(6)
        ]
        for number in range(50)
    }
    found = figures(problems)
    flat = [sample for one in problems.values() for sample in one]
    shares = [statistics.mean(s.correct for s in one) for one in problems.values()]
    assert (found.num_problems, found.n) == (50, 6)
    assert found.accuracy == pytest.approx(statistics.mean(shares))
    assert found.accuracy == pytest.approx(found.pass_at[1])
    assert found.stderr == pytest.approx(statistics.stdev(shares) / math.sqrt(50))
    assert found.pass_at[6] == statistics.mean(any(s.correct for s in p) for p in problems.values())
    assert list(found.pass_at) == [1, 2, 3, 4, 5, 6]
    assert sorted(found.pass_at.values()) == list(found.pass_at.values())
    assert found.mean_tokens == pytest.approx(statistics.mean(s.num_tokens for s in flat))
    assert found.truncated == pytest.approx(statistics.mean(s.truncated for s in flat))


@pytest.mark.parametrize(
    "problems", [{}, {"a": []}, {"a": samples(True), "b": samples(True, True)}]
)
def test_unequal_numbers_of_samples_are_refused(problems: dict[str, list[Sample]]) -> None:
    with pytest.raises(ValueError, match="samples"):
        figures(problems)


def test_differences_are_paired_by_problem() -> None:
    """Problems differ much, models little: only the paired error sees it."""
    random.seed(1)
    hard = {f"p{number}": number % 10 for number in range(300)}
    ours = {name: samples(*[True] * (10 - h), *[False] * h) for name, h in hard.items()}
    worse = {
        name: samples(*[s.correct and not (s is one[0] and random.random() < 0.5) for s in one])
        for name, one in ours.items()
    }
    found = difference(ours, worse)
    gaps = [
        statistics.mean(s.correct for s in ours[p]) - statistics.mean(s.correct for s in worse[p])
        for p in ours
    ]
    assert found.mean == pytest.approx(statistics.mean(gaps))
    assert found.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(300))
    # The bootstrap of a mean of 300 values is nearly normal.
    assert found.low == pytest.approx(found.mean - 1.96 * found.stderr, abs=0.15 * found.stderr)
    assert found.high == pytest.approx(found.mean + 1.96 * found.stderr, abs=0.15 * found.stderr)
    unpaired = math.hypot(figures(ours).stderr, figures(worse).stderr)
    assert found.stderr < unpaired / 5
    assert difference(ours, worse) == found  # one seed
    assert difference(ours, ours).low == difference(ours, ours).high == 0


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="other problems"):
        difference({"a": samples(True)}, {"b": samples(True)})


def test_an_error_needs_two_values() -> None:
    import numpy as np

    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
