r"""The response chooses the option of the reference, by its letter or by its text.

The reference is a letter (`E`, `(E)`), a letter with the option's text (`E. 42`) or, where the row
has `choices` (a list, in the order A, B, ..., or an object by letter), either; a number is a text
or a label there, no index. The choice is what stands in the last box, else in the last `<answer>`
tags, else behind the last "answer is", else on the last line: `E`, `(E)`, `E. 42`, `E is correct`,
or the option's text alone, a number in any form (`0.5` for 1/2). Several letters are none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.choice_cues import NOT, chosen, claims_another, enclosed, phrasings
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.math import warm_up
from sfpo_megatron.rewards.notation import plain
from sfpo_megatron.rewards.row_options import (
    LABEL,
    MARKED,
    is_spelled,
    is_text,
    key_of,
    letter_of,
    options_of,
    reference_of,
)
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation

__all__ = ["explain", "readable", "scorable", "score", "warm_up"]

_REFUTED = re.compile(
    r"(?:is|was|does|do|can|could|would)(?:\s+not\b|n't\b)|cannot\b|(?:rather than|instead of)\b"
    r"|(?:is|was)\s+(?:\w+\s+)?(?:wrong|incorrect|false)\b|is\s+.*\b(?:but|no|not)\b",
    re.IGNORECASE,
)
"""Behind a letter: `(B) is incorrect`."""
_BESIDE = (
    re.compile(
        r"(?:(?i:option|choice) )?[(\[]?(?P<letter>[A-Z])[)\]]?(?:, | \()(?P<text>[^()]+)\)?"
    ),
    re.compile(r"(?P<text>[^()]+?)(?:, | \()(?:(?i:option|choice) )?[(\[]?(?P<letter>[A-Z])[)\]]*"),
)
"""`B, Paris`, `Paris (B)`"""
_GOES_ON = re.compile(r"[.,;](?!\S)|\s+(?:is|are|was|were)\b")
"""Behind an option's text: `Paris is the capital`"""
_DOUBTED = re.compile(
    r"\b(?:no|not|never|nor|or|also|either|wait|actually|but|however|instead|maybe|perhaps|wrong"
    r"|incorrect|false|unsure|whether|if)\b|n't\b|\?",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"(?:^|[,/])\s*[(\[]?[A-Z](?:[)\].:]|$)(?=\s|$)|[\s(\[][(\[]?[A-Z](?:[)\]:](?=\s|$)|\.(?=\s))"
    r"|\b(?:or|and)\s+[(\[]?[A-Z]\b"
)
"""A second letter; the last of `(B) Vitamin C.` is none."""


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for the right option, else 0."""
    options = options_of(prompt.metadata.get("choices"))
    letter, text = reference_of(prompt.answer, options)
    shown = visible(response, thinking)
    answer = chosen(shown)
    if answer is None or refused(answer) is not None:
        return 0.0
    answer = plain(answer)
    is_option = key_of(answer) in map(key_of, options.values())
    if len(answer) == 1 and not is_option and enclosed(shown) is not None:  # else the article `a`
        answer = answer.upper()
    said = phrasings(answer, options)
    return float(any(_right(one, letter, text, options) for one in said))


def _right(answer: str, letter: str, text: str, options: Mapping[str, str]) -> bool:
    if answer in options and answer.isalpha():  # a label, though it be another option's text
        return answer == letter
    if text and is_spelled(answer, text, options):
        return True
    if (label := LABEL.fullmatch(answer)) and label[1] in options:
        rest = label[2].strip()
        return label[1] == letter and (not rest or not text or is_text(rest, text, options))
    if text and is_text(answer, text, options):
        return True
    marked = MARKED.fullmatch(answer)
    if marked is None:
        besides = filter(None, (form.fullmatch(answer) for form in _BESIDE))
        return bool(text) and any(
            one["letter"] == letter and is_text(one["text"], text, options) for one in besides
        )
    rest = (marked["rest"] or "").strip()
    if (marked["bare"] or "").islower() or letter_of(marked) != letter:
        return False
    if rest and text:  # else it may be the letter of one option and the text of another
        return is_text(rest, text, options) or _is_about(rest, letter, text, options)
    if marked["dashed"] and NOT.search(rest):  # `B - Paris, not correct`
        return False
    return not (_ANOTHER.search(rest) or _REFUTED.match(rest) or claims_another(rest, letter))


def _is_about(rest: str, letter: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether a sentence about the option's text, and no other's, stands behind its letter."""
    begin = plain(text).casefold()
    tail = rest[len(begin) :]
    if not rest.casefold().startswith(begin) or not _GOES_ON.match(tail) or _DOUBTED.search(tail):
        return False
    words = f" {key_of(tail)} ".casefold()
    others = {one: other for one, other in options.items() if one != letter}
    return not any(
        re.search(rf"(?<!\w){re.escape(key_of(other).casefold())}(?!\w)", words)
        or re.search(rf"\b{re.escape(one)}\b", tail)
        for one, other in others.items()
    )


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    letter, text = reference_of(prompt.answer, options_of(prompt.metadata.get("choices")))
    return {
        "found": chosen(visible(response, thinking)),
        "read": [],
        "reference": prompt.answer,
        "reference_read": [f"choice {letter}" + (f" ({text})" if text else "")],
    }


def readable(answer: str) -> str | None:
    """Why a reference cannot be read; None if it can."""
    return _why(answer, {})


def scorable(problem: Problem) -> str | None:
    """Why a problem's reference cannot be read beside its choices; None if it can."""
    return _why(problem.answer, options_of(problem.metadata.get("choices")))


def _why(answer: str, options: Mapping[str, str]) -> str | None:
    try:
        reference_of(answer, options)
    except ValueError as error:
        return str(error)
    return None
