"""What a response gives as its answer, for the vote of the majority: text, never evaluated."""

from __future__ import annotations

from sfpo_megatron.config.reward import RewardChoice, RewardConfig
from sfpo_megatron.rewards.boxes import last_boxed
from sfpo_megatron.rewards.choice_cues import chosen, phrasings
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.last_number import last_number
from sfpo_megatron.rewards.notation import plain
from sfpo_megatron.rewards.row_options import MARKED, letter_of
from sfpo_megatron.rewards.tagged import tagged
from sfpo_megatron.rewards.thinking import visible


def answer_of(reward: RewardConfig, choice: RewardChoice | None, response: str) -> str | None:
    """The part of a response that its reward looks at, None if there is none; white space does not
    count. `choice`: that of the prompt's source, of a sum its first function. For one's own
    function, the whole response."""
    function = reward.summands(choice)[0].name
    text = visible(response, reward.thinking)
    found: str | None = text
    if function in ("math", "math_boxed"):
        found = last_boxed(text)
    elif function == "multiple_choice":
        found = _choice(chosen(text))
    elif function == "last_number":
        number = last_number(text)
        found = None if number is None else f"{number.normalize():f}"
    elif function in ("tagged_answer", "reasoning_gym"):
        found = tagged(text) or (text if function == "reasoning_gym" else None)
    return "".join((found or "").split()) or None


def _choice(said: str | None) -> str | None:
    """The letter that a choice names, else what it says: `B`, `(B)` and `B. Paris` are one vote."""
    if said is None or refused(said) is not None:
        return said
    marked = filter(None, map(MARKED.fullmatch, phrasings(plain(said), {})))
    return next(map(letter_of, marked), said)
