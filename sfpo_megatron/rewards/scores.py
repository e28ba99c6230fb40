"""What a response is worth, and how the scores of several functions are one reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sfpo_megatron.config.reward import WeightedReward
from sfpo_megatron.rewards import Problem, VerifierError
from sfpo_megatron.rewards.wire import Explanation

Item: TypeAlias = tuple[Problem, str]
"""A prompt and a response to it."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Score:
    """What one response is worth."""

    reward: float
    correct: bool
    """reward >= 1; of a sum, that of its first function."""
    timed_out: bool
    """It took longer than reward.timeout_s, so it got 0."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the function returned besides the reward, by name; of a sum, what each function gave."""
    explained: Mapping[str, Explanation] = field(default_factory=dict)
    """How response and reference were read, by function; only where that was asked for."""


Outcome: TypeAlias = Score | VerifierError
"""A score, or why there can be none."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Request:
    """Responses for one function."""

    function: WeightedReward
    items: Sequence[Item]


def weighted_sum(summands: Sequence[WeightedReward], scores: Sequence[Score]) -> Score:
    """One score of several. `parts` has the reward of each function as NAME, and what else it
    returned as NAME/PART; in a NAME of your own the colon is a dot."""
    parts: dict[str, float] = {}
    for summand, score in zip(summands, scores, strict=True):
        name = summand.name.replace(":", ".")
        parts[name] = score.reward
        parts |= {f"{name}/{part}": value for part, value in score.parts.items()}
    return Score(
        # Exact, so that equal scores are equal rewards.
        reward=math.fsum(
            s.weight * score.reward for s, score in zip(summands, scores, strict=True)
        ),
        correct=scores[0].correct,
        timed_out=any(score.timed_out for score in scores),
        parts=parts,
        explained={name: one for score in scores for name, one in score.explained.items()},
    )


def not_a_score(prompt: Problem, function: str, why: str) -> VerifierError:
    """The error of a function that returned what is none; `why`: what, and what was expected."""
    return VerifierError(
        f"prompt {prompt.id}: reward.function {function} returned no score: {why}; "
        "correct the function"
    )
