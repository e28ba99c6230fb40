"""The last number in the response is the reference number.

For models that explain before they answer. Numbers are compared exactly, as decimals: `42`,
`42.0`, `+42` and `42,000` / `42000` are pairs of equals; 0.1 + 0.2 style rounding does not occur.
`.5`, `1e-7` and a minus sign of Unicode are read; `50%` is the number 50.
"""

from __future__ import annotations

import re
from decimal import Decimal

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation

# A sign counts only where no digit, letter or bracket stands before it: the last number of `7-3`
# is 3. A point begins a number where none of these stands before it: `x.5` and `1..5` end in 5.
# ASCII digits only; no nested choice, so the time is linear in the response.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[+-])?(?:(?<![\w.)\]])\.[0-9]+|[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?)"
    r"(?:[eE][+-]?[0-9]{1,3}(?!\w|\.[0-9]))?"
)
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_MINUS = str.maketrans("\u2212\u2013\u2010\u2011\ufe63\uff0d", "------")
_MAX_DIGITS = 1000  # a longer one is no answer, and costs time to compare


def last_number(text: str) -> Decimal | None:
    """The last integer or decimal in `text`, None if it has none."""
    number = ""
    for match in _NUMBER.finditer(text.translate(_MINUS)):
        number = match.group()
    if not 0 < len(number) <= _MAX_DIGITS:
        return None
    if _THOUSANDS.fullmatch(number):
        return Decimal(number.replace(",", ""))
    return Decimal(number.rpartition(",")[2])  # `3,4` is a list, it ends in 4


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 if the response's last number equals the reference, else 0."""
    reference = last_number(prompt.answer)
    if reference is None:
        raise ValueError(
            f"answer: found {prompt.answer!r}, expected a number; "
            "use reward.function=exact_match for answers that are none"
        )
    return float(last_number(visible(response, thinking)) == reference)


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    found, reference = last_number(visible(response, thinking)), last_number(prompt.answer)
    return {
        "found": None if found is None else str(found),
        "read": [],
        "reference": prompt.answer,
        "reference_read": [] if reference is None else [str(reference)],
    }


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    return None if last_number(answer) is not None else f"answer: found {answer!r}: no number"
