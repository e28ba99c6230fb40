"""What a reward function may return: each kind of number, and each kind of thing that is none.

Not exercised: jax and other arrays than those of numpy and torch.
"""

from __future__ import annotations

import math
from collections import UserDict
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sfpo_megatron.rewards.components import part_means
from sfpo_megatron.rewards.pool import Score
from sfpo_megatron.rewards.returned import NotAScore, each_of, scored


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        *((0, 0.0), (1, 1.0), (0.25, 0.25), (True, 1.0), (False, 0.0)),
        *((Decimal("0.5"), 0.5), (Fraction(1, 3), 1 / 3)),
        *((np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.float16(0.5), 0.5)),
        *((np.int64(1), 1.0), (np.uint8(0), 0.0), (np.bool_(True), 1.0), (np.array(0.5), 0.5)),
        *((torch.tensor(0.5), 0.5), (torch.tensor(True), 1.0), (torch.tensor(1), 1.0)),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
    ],
)
def test_numbers(value: Any, reward: float) -> None:
    assert scored(value) == (reward, {})
    assert type(scored(value).reward) is float
    assert scored({"reward": value, "other": value}) == (reward, {"other": reward})


def test_minus_zero_is_zero() -> None:
    for zero in (-0.0, np.float32(-0.0), {"reward": -0.0}):
        assert math.copysign(1.0, scored(zero).reward) == 1.0


class Raises:
    """Looks like a number and is none."""

    shape = ()

    def item(self) -> float:
        raise KeyError("item")

    def __repr__(self) -> str:
        raise KeyError("repr")


NO_SCORES: list[Any] = [
    *(None, "1", b"1", "", [0.5], (1.0,), {0.5}, object(), 1j, Raises(), float, iter([1.0])),
    *(math.nan, math.inf, -math.inf, 1.5, -0.1, 2, -1, 10**400, np.nextafter(1.0, 2.0)),
    *(Decimal("NaN"), Decimal("sNaN"), Decimal("1.01"), Fraction(-1, 10**9)),
    *(np.float32("nan"), np.float32(1.5), np.complex64(0.5), np.str_("1"), np.datetime64("2026")),
    *(np.array([0.5]), np.array([[1.0]]), np.array([0.5, 0.5]), np.array(None), np.array("1")),
    *(torch.tensor([0.5]), torch.tensor([0.0, 1.0]), torch.tensor(math.nan), torch.tensor(2.0)),
    torch.tensor(0.5j),
]


@pytest.mark.parametrize("value", NO_SCORES, ids=lambda value: type(value).__name__)
def test_what_is_no_reward(value: Any) -> None:
    with pytest.raises(NotAScore, match=r"found .*, expected a number in \[0, 1\], or a mapping"):
        scored(value)
    with pytest.raises(NotAScore, match=r"found 'reward': .*, expected a number in \[0, 1\]"):
        scored({"reward": value})


def test_a_mapping() -> None:
    given = {"format": 0.2, "reward": 1.0, "num_steps": 12, "delta": -3.5, "é b": True}
    parts = {"format": 0.2, "num_steps": 12.0, "delta": -3.5, "é b": 1.0}
    assert scored(given) == (1.0, parts) == scored(UserDict(given))
    assert scored({"reward": 0.5}) == (0.5, {})


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({}, "found {} (dict), expected an entry 'reward'"),
        ({"format": 1.0}, "expected an entry 'reward'"),
        ({"Reward": 1.0}, "expected an entry 'reward'"),
        ({"reward": 1.0, "x": None}, "found 'x': None, expected a finite number"),
        ({"reward": 1.0, "x": "a"}, "found 'x': 'a' (str), expected a finite number"),
        ({"reward": 1.0, "x": math.inf}, "found 'x': inf (float), expected a finite number"),
        ({"reward": 1.0, "x": {"y": 1.0}}, "found 'x': {'y': 1.0} (dict), expected a finite"),
        ({"reward": 1.0, 3: 1.0}, "found an entry named 3 (int), expected printable text"),
        ({"reward": 1.0, "": 1.0}, "found an entry named '' (str), expected printable text"),
        ({"reward": 1.0, "\ud83d": 1.0}, r"an entry named '\ud83d' (str), expected printable text"),
        ({"reward": 1.0, "a\nb": 1.0}, r"an entry named 'a\nb' (str), expected printable text"),
    ],
)
def test_a_mapping_that_is_no_score(value: Any, found: str) -> None:
    with pytest.raises(NotAScore) as caught:
        scored(value)
    assert found in str(caught.value)


def test_a_message_is_short() -> None:
    with pytest.raises(NotAScore) as caught:
        scored("x" * 10**6)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "given", [[0.0, 1.0], (0.0, 1.0), np.array([0.0, 1.0]), torch.tensor([0.0, 1.0]), range(2)]
)
def test_a_batch(given: Any) -> None:
    assert [scored(value).reward for value in each_of(given, 2)] == [0.0, 1.0]
    assert [scored(value).reward for value in each_of(iter(given), 2)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([1.0], "found 1 entries in [1.0] (list)"),
        ([0.0] * 3, "found 3 entries in"),
        ([], "found 0 entries in [] (list)"),
        (None, "found None"),
        (1.0, "found 1.0 (float)"),
        ("10", "found '10' (str)"),
        ({"reward": [0.0, 1.0], "x": 1}, "found {'reward': [0.0, 1.0], 'x': 1} (dict)"),
        (torch.zeros(1, 2), "found 1 entries in"),
    ],
)
def test_what_is_no_batch(given: Any, found: str) -> None:
    with pytest.raises(NotAScore) as caught:
        each_of(given, 2)
    assert str(caught.value).startswith(found)
    assert str(caught.value).endswith(", expected a list of 2, one entry a response")


def test_means_are_over_those_that_have_the_part() -> None:
    def score(**parts: float) -> Score:
        return Score(reward=0.0, correct=False, timed_out=False, parts=parts)

    scores = [score(format=1.0), score(), score(format=0.0, length=3.0), score(format=0.5)]
    assert part_means(scores, "reward/") == {"reward/format": 0.5, "reward/length": 3.0}
    assert part_means([score()], "reward/") == {}
    tenths = [score(x=0.1)] * 10
    assert part_means(tenths, "eval/reward/") == {"eval/reward/x": 0.1}, "rounded once"
