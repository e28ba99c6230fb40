"""The response, without its thinking and stripped, is the reference answer."""

from __future__ import annotations

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for the same text but for white space around it, else 0."""
    return float(visible(response, thinking).strip() == prompt.answer.strip())


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    found, reference = visible(response, thinking).strip(), prompt.answer.strip()
    return {"found": found, "read": [], "reference": reference, "reference_read": []}
