r"""The response chooses the option of the reference, by its letter or by its text.

The reference is a letter (`E`, `(E)`), a letter with the option's text (`E. 42`) or, where the row
has `choices` (a list, in the order A, B, ..., or an object by letter), either; a number is a text
or a label there, no index. The choice is what stands in the last box, else in the last `<answer>`
tags, else behind the last "answer is", else on the last line: `E`, `(E)`, `E. 42`, `E is correct`,
or the option's text alone, a number in any form (`0.5` for 1/2). Several letters are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.answers import readings
from sfpo_megatron.rewards.boxes import last_boxed
from sfpo_megatron.rewards.equality import equal
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.math import warm_up
from sfpo_megatron.rewards.notation import plain
from sfpo_megatron.rewards.quantities import Value
from sfpo_megatron.rewards.tagged import tagged
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation
from sfpo_megatron.types import Json

__all__ = ["chosen", "explain", "readable", "scorable", "score", "warm_up"]

_MARKED = re.compile(
    r"(?:(?:option|choice|answer)\s+)?"
    r"(?:(?P<bare>[A-Z])|(?:[(\[{]+\s*(?P<bracketed>[A-Z])\s*[)\]}]+[.:]?|(?P<marked>[A-Z])\s*[).:]"
    r"|(?-i:(?P<dashed>[A-Z]))\s+-+(?=\s))(?:\s+(?P<rest>.*))?)",
    re.DOTALL | re.IGNORECASE,
)
_LABEL = re.compile(r"\(?\s*([0-9]{1,2})\s*(?:[).:]|$)\s*(.*)", re.DOTALL)
"""`2`, `(2)`, `2. green`: of a row whose choices have numbers for labels."""
_IS = r"(?:is|was|(?:would|must|should) be)(?:\s+(?:therefore|thus|hence|then|clearly|indeed)\b,?)?"
_ANSWER_IS = re.compile(rf"\banswer\s*(?:\b{_IS}\b\s*[:：]?|[:：])\s*", re.IGNORECASE)
_CHOICE_IS = re.compile(rf"\b(?:answer|choice|option)\b(?:\s+{_IS})?\s*[:：]?\s*", re.IGNORECASE)
"""Looked for where no answer "is"."""
_I_CHOOSE = re.compile(
    r"\b(?:I|we)(?:\s+(?:will|would)|['’](?:ll|d))?\s+(?:choose|select|pick|go with)\s+",
    re.IGNORECASE,
)
_LISTED = re.compile(r"\b[A-Z][)\]]?\s*(?:[,/&]|\b(?:or|and)\b)\s*$")
"""Before a letter: `option A or option B`"""
_NOT = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|false|rather than|instead of|"
    r"if|unless|whether|doubt|suppose|assume)\b|n't\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[.,;:!?]|\b(?:so|thus|hence|therefore|but|and|because|since)\b", re.IGNORECASE
)
_REFUTED = re.compile(
    r"(?:is|was|does|do|can|could|would)(?:\s+not\b|n't\b)|cannot\b|(?:rather than|instead of)\b"
    r"|(?:is|was)\s+(?:\w+\s+)?(?:wrong|incorrect|false)\b|is\s+.*\b(?:but|no|not)\b",
    re.IGNORECASE,
)
"""Behind a letter: `(B) is incorrect`."""
_IS_RIGHT = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,?\s+)?(?:only\s+)?(?P<choice>.+?)\s+is\s+"
    r"(?:(?:indeed|the|correct|right|best|only|final|most|likely|appropriate|suitable)\s+)*"
    r"(?:correct|right|true|answer|option|choice)",
    re.DOTALL | re.IGNORECASE,
)
"""`(B) is the correct answer`"""
_REASON = re.compile(
    r",?\s+(?:(?:because|since)\b(?!.*\b(?:no|wait|actually|but|however|instead)\b)[^.!?]*"
    r"|(?:and\s+)?(?:not|rather than|instead of)\s+"
    r"(?:(?:option|choice)\s+)?[(\[]?(?-i:[A-Z])[)\]]?)$",
    re.DOTALL | re.IGNORECASE,
)
"""Behind a letter: `B, because A is too small`, `B, not A`"""
_NUMERAL = re.compile(r"[0-9]|\\(?:frac|sqrt|pi)")
_BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*]+)\*\*(?!\w)")
"""`**B**`, also before a full stop; `2**3` is none."""
_ANOTHER = re.compile(
    r"(?:^|[,/])\s*[(\[]?[A-Z](?:[)\].:]|$)(?=\s|$)|[\s(\[][(\[]?[A-Z](?:[)\]:](?=\s|$)|\.(?=\s))"
    r"|\b(?:or|and)\s+[(\[]?[A-Z]\b"
)
"""A second letter; the last of `(B) Vitamin C.` is none."""
_LINE_CHARS = 2000


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for the right option, else 0."""
    options = _options(prompt.metadata.get("choices"))
    letter, text = _reference(prompt.answer, options)
    shown = visible(response, thinking)
    answer = chosen(shown)
    if answer is None or refused(answer) is not None:
        return 0.0
    answer = plain(answer)
    if len(answer) == 1 and _enclosed(shown) is not None:  # a line may end in the article `a`
        answer = answer.upper()
    said = _phrasings(answer, options)
    return float(any(_right(one, letter, text, options) for one in said))


def _phrasings(answer: str, options: Mapping[str, str]) -> Iterator[str]:
    """A choice as it is said, then without the reason and the verdict behind it."""
    yield answer
    if _key(answer) in map(_key, options.values()):  # `P and not Q` may be one, and `P` another
        return
    short = _REASON.sub("", answer)
    yield short
    if verdict := _IS_RIGHT.fullmatch(short):
        yield verdict["choice"]


def _right(answer: str, letter: str, text: str, options: Mapping[str, str]) -> bool:
    if text and _key(answer) == _key(text):
        return True
    if (label := _LABEL.fullmatch(answer)) and label[1] in options:
        rest = label[2].strip()
        return label[1] == letter and (not rest or not text or _same(rest, text, options))
    if text and _same(answer, text, options):
        return True
    marked = _MARKED.fullmatch(answer)
    if marked is None:
        return False
    rest = (marked["rest"] or "").strip()
    if (marked["bare"] or "").islower() or _letter(marked) != letter:
        return False
    if rest and text:  # else it may be the letter of one option and the text of another
        return _same(rest, text, options)
    if marked["dashed"] and _NOT.search(rest):  # `B - Paris, not correct`
        return False
    return not _ANOTHER.search(rest) and not _REFUTED.match(rest)


def _letter(marked: re.Match[str]) -> str:
    found = marked.group("bare", "bracketed", "marked", "dashed")
    return next(filter(None, found)).upper()


def _same(found: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether it is an option's text; a number may be written otherwise, if no other is meant."""
    if _key(found) == _key(text):
        return True
    if not _NUMERAL.search(text) or _key(found) in map(_key, options.values()):
        return False
    return [one for one in {text, *options.values()} if _same_number(one, found)] == [text]


def _same_number(text: str, found: str) -> bool:
    numbers = [one for one in readings(text) if isinstance(one, Value)]
    return any(equal(one, other) for one in numbers for other in readings(found))


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
    for letter, text in options.items():
        if _same(spelled, text, options):
            return letter, text
    marked = _MARKED.fullmatch(spelled)
    if marked is None:
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected the letter of an option, such as E or "
            "'E. 42', or one of the row's `choices`; use reward.function=exact_match or math"
        )
    letter = _letter(marked)
    if options and letter not in options:
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected one of the row's `choices` "
            f"({', '.join(options)}); correct either"
        )
    return letter, (marked["rest"] or "").strip() or options.get(letter, "")


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
    said = _enclosed(text)
    if said is not None:
        return said
    line = _BOLD.sub(r"\1", text.strip().rsplit("\n", 1)[-1][-_LINE_CHARS:]).strip()
    short = _REASON.sub("", line.rstrip(".!* "))
    verdict = _IS_RIGHT.fullmatch(short)
    if verdict and (
        _MARKED.fullmatch(verdict["choice"]) or not _CHOICE_IS.search(verdict["choice"])
    ):
        return short
    kinds = ([*cue.finditer(line)] for cue in (_ANSWER_IS, _CHOICE_IS, _I_CHOOSE))
    cues = next(filter(None, kinds), [])
    end = cues[-1].end() if cues else 0
    if cues and (
        _NOT.search(_CLAUSE.split(line[:end].rstrip(": "))[-1])
        or _LISTED.search(line, 0, cues[-1].start())
    ):
        return None
    return line[end:].strip("* ") or None


def _enclosed(text: str) -> str | None:
    """What is in its last box, else in its last tags."""
    boxed = last_boxed(text)
    return tagged(text) if boxed is None else boxed


def _key(text: str) -> str:
    return re.sub(r"[\s.]+", " ", plain(text)).strip().casefold()
