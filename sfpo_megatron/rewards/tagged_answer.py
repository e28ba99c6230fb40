r"""The content of the last `<answer>...</answer>` is the reference: as text, or as mathematics.

For models that are asked to answer in tags. Without a pair of tags a response is wrong. What is in
them is compared as `math` compares (a \boxed{} in the tags is taken off), words as words.
"""

from __future__ import annotations

from sfpo_megatron.rewards import Problem, math
from sfpo_megatron.rewards.boxes import boxes
from sfpo_megatron.rewards.math import warm_up
from sfpo_megatron.rewards.tagged import tagged
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation

__all__ = ["explain", "readable", "score", "warm_up"]


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 if the tagged answer is right, else 0."""
    reference = tagged(prompt.answer) or prompt.answer.strip()
    if not reference:
        raise ValueError(
            f"answer: found {prompt.answer!r}, expected an answer; correct or remove the row"
        )
    found = tagged(visible(response, thinking))
    if not found:
        return 0.0
    if found == reference:
        return 1.0
    boxed = boxes(found)
    answer = ", ".join(boxed) if boxed else found
    return float(math.readable(reference) is None and math.same_answer(reference, answer))


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    found = tagged(visible(response, thinking))
    reference = tagged(prompt.answer) or prompt.answer.strip()
    return {
        "found": found,
        "read": math.read_as(", ".join(boxes(found)) or found) if found else [],
        "reference": reference,
        "reference_read": [] if math.readable(reference) else math.reference_as(reference),
    }


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    return None if (tagged(answer) or answer.strip()) else f"answer: found {answer!r}: empty"
