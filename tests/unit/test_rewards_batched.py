"""`reward.batched`: a reward function of lists, through the real scoring processes."""

from __future__ import annotations

import pytest
from own_rewards import Own, log_of, own, problem, rewards

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.rewards.pool import VerifierError

__all__ = ["own"]  # the fixture

BATCHED = """
import os, time
def score(responses, prompts):
    assert type(responses) is list and type(prompts) is list
    assert len(responses) == len(prompts)
    if "hang" in responses: time.sleep(600)
    if "die" in responses: os._exit(1)
    if "raise" in responses: raise KeyError("raise")
    if "short" in responses: return [1.0]
    n = len(responses)
    return [{"reward": r == p.answer, "size": n} for r, p in zip(responses, prompts)]
async def later(responses, prompts):
    import asyncio
    await asyncio.gather(*(asyncio.sleep(0.001) for _ in responses))
    return score(responses, prompts)
"""


@pytest.mark.parametrize("function", ["score", "later"])
def test_a_batch_is_one_call(own: Own, function: str) -> None:
    pool = own(BATCHED, function, batched=True, num_workers=2)
    scores = pool.score([(problem(str(i), f"p/{i}"), str(i - i % 2)) for i in range(9)])
    assert rewards(scores) == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert [score.parts["size"] for score in scores] == [5] * 5 + [4] * 4
    assert pool.score([]) == []


@pytest.mark.parametrize("what", ["hang", "die", "raise"])
def test_only_the_culprit_of_a_batch_gets_0(own: Own, what: str) -> None:
    """The others are scored again, each by itself."""
    pool = own(BATCHED, batched=True, timeout_s=0.5)
    scores = pool.score([(problem(), r) for r in ("42", "41", what, "42")])
    assert rewards(scores) == [1.0, 0.0, 0.0, 1.0]
    assert [score.timed_out for score in scores] == [False, False, what == "hang", False]
    assert [score.parts.get("size") for score in scores] == [1.0, 1.0, None, 1.0]


def test_a_batch_that_raises_only_as_a_whole_is_scored_and_said(own: Own) -> None:
    pool = own("def score(rs, ps):\n    (r,) = rs\n    return [r == '42']", batched=True)
    assert rewards(pool.score([(problem(), "42"), (problem(), "41")])) == [1.0, 0.0]
    assert "ValueError: too many values" in log_of() and "a batch of 2 raised this" in log_of()


def test_a_batch_of_the_wrong_length_is_an_error(own: Own) -> None:
    pool = own(BATCHED, batched=True)
    with pytest.raises(VerifierError, match=r"prompt p/0: .*found 1 entries in .*list of 2"):
        pool.score([(problem(), "42"), (problem(), "short")])


def test_a_batch_may_take_its_length_times_the_limit(own: Own) -> None:
    """And is scored in one call for all that."""
    pool = own(
        "import time\n"
        "def score(responses, prompts):\n"
        "    n = len(responses)\n"
        "    time.sleep(0.3 * n)\n"
        "    return [{'reward': 1.0, 'size': n}] * n\n",
        batched=True,
        timeout_s=0.5,
    )
    scores = pool.score([(problem(), "x")] * 4)
    assert [(score.reward, score.parts["size"]) for score in scores] == [(1.0, 4.0)] * 4


def test_batched_is_never_guessed(own: Own) -> None:
    """A function of lists without `batched` is an error, not a reward."""
    pool = own("def score(responses, prompts): return [1.0 for _ in responses]")
    with pytest.raises(VerifierError, match=r"found \[1\.0, 1\.0\] \(list\), expected a number"):
        pool.score([(problem(), "42")])


def test_what_is_built_in_takes_no_batch() -> None:
    with pytest.raises(FieldError, match="batched: found True, expected false with function math"):
        RewardConfig(function="math", batched=True)
    with pytest.raises(FieldError, match=r"function: found 'maths', expected one of reasoning_gym"):
        RewardConfig(function="maths")
