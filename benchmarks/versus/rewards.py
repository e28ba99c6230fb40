"""Rewards that both trainers call."""

from __future__ import annotations

from sfpo_megatron.rewards import Problem


def right(response: str, prompt: Problem) -> float:
    """The response is the answer."""
    return float(response.strip() == prompt.answer)


def even_length(response: str, prompt: Problem) -> float:
    """An even number of characters: a random policy gets it half of the time."""
    return float(len(response) % 2 == 0)
