"""What a response gives as its answer, for the vote of the majority: text, never evaluated."""

from __future__ import annotations

from sfpo_megatron.rewards.last_number import last_number
from sfpo_megatron.rewards.math import last_boxed
from sfpo_megatron.rewards.reasoning_gym import tagged_answer


def answer_of(reward: str, text: str) -> str | None:
    """The answer that the reward function of this name looks at, None if there is none; of one's
    own function, the whole response."""
    if reward in ("math", "math_boxed"):
        boxed = last_boxed(text)
        return None if boxed is None else "".join(boxed.split())
    if reward == "last_number":
        number = last_number(text)
        return None if number is None else f"{number.normalize():f}"
    if reward == "reasoning_gym":
        return tagged_answer(text) or None
    return text.strip() or None
