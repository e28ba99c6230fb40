r"""The response chooses the option of the reference, by its letter or by its text.

The reference is a letter (`E`, `(E)`), a letter with the option's text (`E. 42`) or, where the row
has `choices` (a list, in the order A, B, ..., or an object by letter), either; a number is a text
or a label there, no index. The choice is what stands in the last box, else in the last `<answer>`
tags, else behind the last "answer is", else on the last line: `E`, `(E)`, `E. 42`, or the option's
text alone. Several letters are none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.boxes import last_boxed
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.notation import plain
from sfpo_megatron.rewards.tagged import tagged
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation
from sfpo_megatron.types import Json

_MARKED = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*[).:]|([A-Z]))(?:\s+(.*))?",
    re.DOTALL | re.IGNORECASE,
)
_LABEL = re.compile(r"\(?\s*([0-9]{1,2})\s*(?:[).:]|$)\s*(.*)", re.DOTALL)
"""`2`, `(2)`, `2. green`: of a row whose choices have numbers for labels."""
_IS = r"(?:is|was|would be|must be)"
_ANSWER_IS = re.compile(rf"\banswer\s*(?:\b{_IS}\b\s*:?|:)\s*", re.IGNORECASE)
_CHOICE_IS = re.compile(rf"\b(?:answer|choice|option)\b(?:\s+{_IS})?\s*:?\s*", re.IGNORECASE)
"""Looked for where no answer "is"."""
_NOT = re.compile(
    r"\b(?:not|never|cannot|wrong|incorrect|false|rather than|instead of)\b|n't\b", re.IGNORECASE
)
_CLAUSE = re.compile(
    r"[.,;:!?]|\b(?:so|thus|hence|therefore|but|and|because|since)\b", re.IGNORECASE
)
_REFUTED = re.compile(
    r"(?:is|was|does|do|can|could|would)(?:\s+not\b|n't\b)|cannot\b|(?:rather than|instead of)\b"
    r"|(?:is|was)\s+(?:\w+\s+)?(?:wrong|incorrect|false)\b",
    re.IGNORECASE,
)
"""Behind a letter: `(B) is incorrect`."""
_BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*]+)\*\*(?!\w)")
"""`**B**`, also before a full stop; `2**3` is none."""
_ANOTHER = re.compile(
    r"(?:^|[,/])\s*\(?[A-Z](?:[).:]|$)(?=\s|$)|[\s(]\(?[A-Z](?:[):](?=\s|$)|\.(?=\s))"
    r"|\b(?:or|and)\s+\(?[A-Z]\b"
)
"""A second letter; the last of `(B) Vitamin C.` is none."""
_LINE_CHARS = 2000


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for the right option, else 0."""
    options = _options(prompt.metadata.get("choices"))
    letter, text = _reference(prompt.answer, options)
    answer = chosen(visible(response, thinking))
    if answer is None or refused(answer) is not None:
        return 0.0
    answer = plain(answer)
    if text and _key(answer) == _key(text):
        return 1.0
    if (label := _LABEL.fullmatch(answer)) and label[1] in options:
        rest = label[2].strip()
        return float(label[1] == letter and (not rest or not text or _key(rest) == _key(text)))
    marked = _MARKED.fullmatch(answer)
    if marked is None:
        return 0.0
    rest = (marked[4] or "").strip()
    found = marked[1] or marked[2] or marked[3]
    if marked[3] and (rest or found.islower()):
        return 0.0
    if rest and text:  # else it may be the letter of one option and the text of another
        return float(found.upper() == letter and _key(rest) == _key(text))
    return float(found.upper() == letter and not _ANOTHER.search(rest) and not _REFUTED.match(rest))


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    letter, text = _reference(prompt.answer, _options(prompt.metadata.get("choices")))
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
    return _why(problem.answer, _options(problem.metadata.get("choices")))


def _why(answer: str, options: Mapping[str, str]) -> str | None:
    try:
        _reference(answer, options)
    except ValueError as error:
        return str(error)
    return None


def _reference(answer: str, options: Mapping[str, str]) -> tuple[str, str]:
    """The letter and the text, "" if the row does not say."""
    spelled = plain(last_boxed(answer) or answer)
    for letter, text in options.items():
        if _key(text) == _key(spelled):
            return letter, text
    if (label := _LABEL.fullmatch(spelled)) and label[1] in options:
        return label[1], options[label[1]]
    marked = _MARKED.fullmatch(spelled)
    if marked is None or (marked[3] and marked[4]):
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected the letter of an option, such as E or "
            "'E. 42', or one of the row's `choices`; use reward.function=exact_match or math"
        )
    letter = (marked[1] or marked[2] or marked[3]).upper()
    if options and letter not in options:
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected one of the row's `choices` "
            f"({', '.join(options)}); correct either"
        )
    return letter, (marked[4] or "").strip() or options.get(letter, "")


def _options(choices: Json) -> dict[str, str]:
    if isinstance(choices, Mapping):
        texts, labels = choices.get("text"), choices.get("label")
        if isinstance(texts, Sequence) and isinstance(labels, Sequence):
            letters = (str(label).upper() for label in labels)
            return dict(zip(letters, map(str, texts), strict=False))
        return {str(letter).upper(): str(text) for letter, text in choices.items()}
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        return {chr(ord("A") + index): str(text) for index, text in enumerate(choices[:26])}
    return {}


def chosen(text: str) -> str | None:
    """What a response, without its thinking, chooses, as it is written; None if nothing."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    in_tags = tagged(text)
    if in_tags is not None:
        return in_tags
    lines = text.strip().rsplit("\n", 1)
    line = _BOLD.sub(r"\1", lines[-1][-_LINE_CHARS:]).strip()
    cues = [*_ANSWER_IS.finditer(line)] or [*_CHOICE_IS.finditer(line)]
    end = cues[-1].end() if cues else 0
    if cues and _NOT.search(_CLAUSE.split(line[:end].rstrip(": "))[-1]):
        return None
    return line[end:].strip("* ") or None


def _key(text: str) -> str:
    return re.sub(r"[\s.]+", " ", plain(text)).strip().casefold()
