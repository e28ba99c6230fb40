"""The last number in the response is the reference number.

For models that explain before they answer. Numbers are compared exactly, as decimals: `42`,
`42.0`, `+42` and `42,000` / `42000` are pairs of equals; 0.1 + 0.2 style rounding does not occur.
"""

from __future__ import annotations

import re
from decimal import Decimal

from sfpo_megatron.rewards import Problem

# A sign counts only where no digit, letter or bracket stands before it: the last number of `7-3`
# is 3. ASCII digits only; no nested choice, so the time is linear in the response.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[+-])?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_MAX_DIGITS = 1000  # a longer one is no answer, and costs time to compare


def last_number(text: str) -> Decimal | None:
    """The last integer or decimal in `text`, None if it has none."""
    number = ""
    for match in _NUMBER.finditer(text):
        number = match.group()
    if not 0 < len(number) <= _MAX_DIGITS:
        return None
    if _THOUSANDS.fullmatch(number):
        return Decimal(number.replace(",", ""))
    return Decimal(number.rpartition(",")[2])  # `3,4` is a list, it ends in 4


def score(response: str, prompt: Problem) -> float:
    """1 if the response's last number equals the reference, else 0."""
    reference = last_number(prompt.answer)
    if reference is None:
        raise ValueError(
            f"answer: found {prompt.answer!r}, expected a number; "
            "use reward.function=exact_match for answers that are none"
        )
    return float(last_number(response) == reference)
