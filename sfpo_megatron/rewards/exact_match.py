"""The response, without its thinking and stripped, is the reference answer."""

from __future__ import annotations

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.thinking import STRIP, visible


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for the same text but for white space around it, else 0."""
    return float(visible(response, thinking).strip() == prompt.answer.strip())
