"""reasoning_gym's tasks: a reference scores the same here and in a scoring process.

Not exercised: tasks that need settings (composite).
"""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from sfpo_megatron.config.tree import DataSource, RewardConfig
from sfpo_megatron.data import reasoning_gym as made
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.rewards import reasoning_gym
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem, packed, unpacked

SAMPLE = ("arc_agi", "rearc", "chain_sum", "rush_hour")
NEEDS_SETTINGS = {"composite"}


def problems_of(task: str, size: int) -> list[WireProblem]:
    source = DataSource(source="reasoning_gym", task=task, args={}, size=size)
    rows = list(source_rows(source, seed=5, key="k", name=task))
    assert all(isinstance(row, Row) for row in rows), rows
    return [
        WireProblem(id=row.id, question=row.question, answer=row.answer, metadata=row.metadata)
        for row in rows
        if isinstance(row, Row)
    ]


def problem_of(task: str) -> WireProblem:
    return problems_of(task, 1)[0]


WITHOUT_REFERENCE = frozenset(
    {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
)
"""Tasks whose entries have no answer: their verifiers judge a response by the entry alone."""


def score_here(text: str, problem: WireProblem) -> float:
    """A task's verifier may raise on what is no answer of its kind; the pool gives 0 then."""
    try:
        return reasoning_gym.score(text, problem)
    except Exception:
        assert text != problem.answer
        return 0.0


def hold(tasks: list[str]) -> None:
    problems = [problem_of(task) for task in tasks]
    wrong = "<answer>no such answer</answer>"
    responses = [(problem, text) for problem in problems for text in (problem.answer, wrong)]
    here = [score_here(text, problem) for problem, text in responses]
    with ScoringPool(RewardConfig(function="reasoning_gym", timeout_s=20.0)) as pool:
        there = [score.reward for score in pool.score(responses)]
    parted = {p.id: (h, t) for (p, _), h, t in zip(responses, here, there, strict=True) if h != t}
    assert not parted
    unsolved = {task for task, reward in zip(tasks, there[::2], strict=True) if reward < 1}
    assert unsolved == WITHOUT_REFERENCE & set(tasks)


def test_a_sample_of_the_tasks() -> None:
    hold(list(SAMPLE))


def test_fractions_among_many_problems() -> None:
    """gsm_symbolic keeps some of its numbers as fractions."""
    problems = problems_of("gsm_symbolic", 200)
    assert any("Fraction(" in repr(problem.metadata) for problem in problems)
    with ScoringPool(RewardConfig(function="reasoning_gym", timeout_s=20.0)) as pool:
        scores = pool.score([(problem, problem.answer) for problem in problems])
    assert all(score.correct for score in scores)


def test_an_entry_that_cannot_travel_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any entry of a task, not its first alone."""
    entries = [{"question": "1 + 1 =", "answer": "2", "metadata": {"x": x}} for x in (1, {2}, 3)]
    monkeypatch.setattr(made, "build_dataset", lambda *_, **__: entries)
    source = DataSource(source="reasoning_gym", task="chain_sum", size=3)
    rows = list(source_rows(source, seed=5, key="k", name="n"))
    assert [isinstance(row, Row) for row in rows] == [True, False, True]
    assert "entry 1: found an entry that is not JSON" in str(rows[1])


@pytest.mark.full
def test_all_tasks() -> None:
    import reasoning_gym as package

    hold(sorted(set(package.factory.DATASETS) - NEEDS_SETTINGS))


def test_tasks_without_a_reference_are_known_by_name() -> None:
    for task in WITHOUT_REFERENCE & set(SAMPLE):
        assert problem_of(task).metadata["entry"]["answer"] is None
    assert problem_of("chain_sum").metadata["entry"]["answer"] is not None


@pytest.mark.parametrize(
    "value",
    [
        {"grid": ((1, 2), (3, 4)), "list": [[1, 2], (3,)], "deep": [{"a": ({"b": ()},)}]},
        {1: "a", 2: {(0, 1): "b"}},
        {"share": Fraction(1, 3), "of": [Fraction(2)]},
        {"plain": [1, 2.5, "x", None, True], "empty": {}},
    ],
)
def test_metadata_arrives_as_it_was(value: object) -> None:
    assert repr(unpacked(json.dumps(packed(value)).encode())) == repr(value)
