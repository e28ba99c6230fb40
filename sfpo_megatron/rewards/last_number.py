"""The last number in the response is the reference number.

For models that explain before they answer. Numbers are compared exactly, as decimals: `42`,
`42.0`, `+42` and `42,000` / `42000` are pairs of equals; 0.1 + 0.2 style rounding does not occur.
`.5`, `1e-7`, digits and signs of Unicode and thousands as LaTeX has them (`1{,}234`, `1\\,234`) are
read; `50%` is the number 50. A sign may stand apart from its number (`x = - 5`, `$-\\,5$`), but in
`8 - 5` it is no sign. A reference that ends in a part of something else (`1/2`, `x^2`,
`2\\pi`, `7:30`) is refused: its last number is not what was asked for.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation

# A sign counts only where no digit, letter or bracket stands before it: the last number of `7-3`
# is 3. A point begins a number where none of these stands before it: `x.5` and `1..5` end in 5.
# No nested choice, so the time is linear in the response.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[+-](?:\\?[$€£])?)?(?:(?<![\w.)\]])\.[0-9]+|[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?)"
    r"(?:[eE][+-]?[0-9]{1,3}(?!\w|\.[0-9]))?"
)
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_APART = re.compile(
    r"(?<=[0-9])(?:\{,\}|,?\\!|\\[,;: ]|\\thinspace ?|['\u00a0\u2009\u202f\u066c])"
    r"(?=[0-9]{3}(?![0-9]))"
)
_LOOSE_SIGN = re.compile(
    r"(\A|:\*\*|[=:(\[{,;</>~≈≤≥≠×·→]|(?<!\+)\+|(?<!\*)\*|(?<!\S)\*\*|"
    r"(?<![^\s(\[{=:,;])\$\$?|"
    r"\\(?:approx|sim|leq?|geq?|neq?|times|cdot|div|to|implies|Rightarrow)(?![A-Za-z]))"
    r"([ \t]*[+-])(?:[ \t{]|\\[,;:! ])+(?=(?:\\?[$€£])?\.?[0-9])"
)
"""A sign apart from its digits, and not between two numbers: `= - 5`, `$-\\,5$`, `-{5}`. At the
beginning of a further line it is none: lists begin so."""
_TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,80}>|^[ \t]*>[ \t>]*", re.MULTILINE)
"""HTML's tags, and Markdown's marks of a quotation."""
_BEFORE_PART = re.compile(
    r"[/^_]\s*\{?\s*$|[0-9]\s*:\s*\{?\s*$|\\[A-Za-z]*(?:frac|sqrt)[^A-Za-z]*$"
)
_BEHIND_PART = re.compile(
    r"\s*\}?\s*(?:\^(?!\s*\{?\s*\\circ)|_|\\(?:frac|sqrt|pi|cdot|times)(?![A-Za-z]))"
)
_POWER = re.compile(r"([A-Za-z]\}?\^\{?)-?[0-9]+(?:\.[0-9]+)?")
"""`45 m^2`: its 2 is a part of the unit."""
_MINUS = str.maketrans("\u2212\u2013\u2010\u2011\ufe63\uff0d", "------")
_MAX_DIGITS = 1000  # a longer one is no answer, and costs time to compare


def last_number(text: str) -> Decimal | None:
    """The last integer or decimal in `text`, None if it has none."""
    number = ""
    for match in _NUMBER.finditer(_POWER.sub(r"\1", _spelled(text))):
        number = match.group()
    number = re.sub(r"[\\$€£]", "", number)
    if not 0 < len(number) <= _MAX_DIGITS:
        return None
    if _THOUSANDS.fullmatch(number):
        return Decimal(number.replace(",", ""))
    return Decimal(number.rpartition(",")[2])  # `3,4` is a list, it ends in 4


def _spelled(text: str) -> str:
    """Spell it in ASCII's digits, the signs at their digits, a comma between thousands."""
    if not text.isascii():
        text = text.translate(_MINUS)
        text = "".join(char if char.isascii() else _digit(char) for char in text)
    return _LOOSE_SIGN.sub(r"\1\2", _APART.sub(",", _TAG.sub(" ", text)))


def _digit(char: str) -> str:
    value = unicodedata.decimal(char, None)
    return char if value is None else str(value)


def _of_reference(answer: str) -> Decimal | None:
    """The last number of a reference; None if it is a part of something else."""
    spelled = _spelled(answer)
    number = max(_NUMBER.finditer(spelled), key=re.Match.end, default=None)
    if number is None or _BEHIND_PART.match(spelled, number.end()):
        return None
    before = spelled[max(0, number.start() - 40) : number.start()]
    return None if _BEFORE_PART.search(before) else last_number(answer)


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 if the response's last number equals the reference, else 0."""
    reference = _of_reference(prompt.answer)
    if reference is None:
        raise ValueError(
            f"answer: found {prompt.answer!r}, expected a number; "
            "use reward.function=math or exact_match for answers that are none"
        )
    return float(last_number(visible(response, thinking)) == reference)


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    found, reference = last_number(visible(response, thinking)), _of_reference(prompt.answer)
    return {
        "found": None if found is None else str(found),
        "read": [],
        "reference": prompt.answer,
        "reference_read": [] if reference is None else [str(reference)],
    }


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    if _of_reference(answer) is not None:
        return None
    return f"answer: found {answer!r}: no number, or a part of something else is its last"
