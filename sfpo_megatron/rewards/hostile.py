"""Answers that are refused unread: no one writes them, and each could cost a scoring process.

A static look at the text, well below a millisecond. What passes is still bounded where it is read
(`expressions.py` limits powers and factorials) and by `reward.timeout_s`.
"""

from __future__ import annotations

import re

MAX_CHARS = 10_000
MAX_NESTING = 200
MAX_DIGITS = 1000
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 1000

_BRACKET = re.compile(r"\\.|[\[\](){}]", re.DOTALL)
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_LONG_EXPONENT = re.compile(r"(?:\^|\*\*|[0-9][eE])\s*[{(]*\s*[-+]?[0-9]{5,}")
_FACTORIAL = re.compile(r"[0-9]{4,}\s*[)}]*\s*!|!\s*[)}]*\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom[^A-Za-z]*[0-9]{5,}")
_TOWER = re.compile(r"(?:\^\s*[{(]+[^{}()^]*){5}")
_CODE = re.compile(r"__|(?<!\\)\blambda\s*[^\W\d_]*\s*:|\b(?:import|exec|eval|getattr|globals)\b")


def refused(text: str) -> str | None:
    """Why an answer is not read; None if it is."""
    if len(text) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if "\0" in text:
        return "a NUL character"
    if len(text) > MAX_NESTING and _nesting(text) > MAX_NESTING:
        return f"brackets nested deeper than {MAX_NESTING}"
    for pattern, why in (
        (_LONG_NUMBER, f"a number of more than {MAX_DIGITS} digits"),
        (_LONG_EXPONENT, f"an exponent of {MAX_EXPONENT} or more"),
        (_TOWER, "a tower of powers"),
        (_FACTORIAL, f"a factorial of {MAX_FACTORIAL} or more"),
        (_BINOMIAL, "a huge binomial coefficient"),
        (_CODE, "program code"),
    ):
        if pattern.search(text):
            return why
    return None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.finditer(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(bracket.group(), 0)
        deepest = max(deepest, depth)
    return deepest
