r"""`math`, with 0.1 for a wrong answer in \boxed{}: the reward of the paper's released code."""

from __future__ import annotations

from sfpo_megatron.rewards import Problem, math
from sfpo_megatron.rewards.math import explain, readable, warm_up
from sfpo_megatron.rewards.thinking import STRIP, visible

__all__ = ["explain", "readable", "score", "warm_up"]

BOXED_WRONG = 0.1


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for a right answer, 0.1 for a wrong one in a box, else 0."""
    if math.score(response, prompt, thinking=thinking) == 1.0:
        return 1.0
    return BOXED_WRONG if math.last_boxed(visible(response, thinking)) is not None else 0.0
