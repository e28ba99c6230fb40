"""The response, stripped, is the reference answer."""

from __future__ import annotations

from sfpo_megatron.rewards import Problem


def score(response: str, prompt: Problem) -> float:
    """1 for the same text but for white space around it, else 0."""
    return float(response.strip() == prompt.answer.strip())
