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
_IS = (
    r"(?:is|was|(?:would|must|should) be)"
    r"(?:\s+(?:therefore|thus|hence|then|clearly|indeed|definitely|probably|(?:most )?likely)\b,?)?"
)
_ANSWER_IS = re.compile(rf"\banswer\s*(?:\b{_IS}\b\s*[:：]?|[:：])\s*", re.IGNORECASE)
_CHOICE_IS = re.compile(
    rf"\b(?:answer|choice|option)\b(?P<is>\s+{_IS}\s*[:：]?|\s*[:：])?\s*", re.IGNORECASE
)
"""Looked for where no answer "is"."""
_LED = re.compile(
    r"(?:(?:^|[.!?:;]|\b(?:is|be|choos\w+|chose|select\w*|pick\w*|match\w*|fits?|go(?:ing)? with"
    r"|correspond\w* (?:to|with)|consistent with|so|thus|hence|therefore|then|leav(?:es|ing)|only"
    rf"|{_IS})\b)|(?P<aside>[,(–—-]|\b(?:and|but|while|because|since)\b))"
    r"[\s,*(]*(?:(?:only|the|my|final|correct|right|best)\s+)*$",
    re.IGNORECASE,
)
"""Before an `option B` that is chosen: `Paris, option B` is, `A is better than option B` is not."""
_DISCARDED = re.compile(
    r"\b(?:eliminat\w*|rul\w* out|exclud\w*|reject\w*|contradict\w*|refut\w*|than|over|unlike"
    r"|except)\b",
    re.IGNORECASE,
)
_I_CHOOSE = re.compile(
    r"\b(?:I|we)(?:\s+(?:will|would)|['’](?:ll|d))?\s+(?:choose|select|pick|go with)\s+",
    re.IGNORECASE,
)
_LISTED = re.compile(r"\b[A-Z][)\]]?\s*(?:[,/&]|\b(?:or|and)\b)\s*$")
"""Before a letter: `option A or option B`"""
_NOT = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|false|rather than|instead of|"
    r"if|unless|whether|doubt|suppose|assume|mistake|distractor|no longer|hardly|barely)\b|n't\b"
    r"|\b(?:least|worst|bad|second|next|another|other|alternative)[\s-]+(?:\w+\s+)?"
    r"(?:answer|choice|option)\b",
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
    r"[.,]?\s+(?:(?:because|since)\b"
    r"(?!.*\b(?:no|wait|actually|but|however|instead|either|unsure|whether)\b)[^.!?]*"
    r"|(?:and\s+)?(?:not|rather than|instead of|over)\s+"
    r"(?:(?:option|choice)\s+)?[(\[]?(?-i:[A-Z])[)\]]?"
    r"|I hope (?:it|this|that) (?:is correct|helps))$",
    re.DOTALL | re.IGNORECASE,
)
"""Behind a letter: `B, because A is too small`, `B, not A`"""
_BY_LETTER = re.compile(r"(?i:\b(?:because|since))\s+[(\[]?[A-Z][)\]]?$")
_CLAIMED = re.compile(
    r"\b(?-i:(?P<first>[A-Z]))[)\]]?\s+(?:is|must be|seems)\s+(?:(?:the|most|best|only)\s+)*"
    r"(?:(?:correct|right|true|best)\b(?=\s*(?:$|[,.;:!?)]|(?:answer|option|choice|one)\b))"
    r"|(?:answer|option|choice)\b)"
    rf"|\b(?:answer|option|choice|one)\s+{_IS}\s+(?:(?:option|choice)\s+)?[(\[]?"
    r"(?-i:(?P<last>[A-Z]))\b",
    re.IGNORECASE,
)
"""`since C is correct`, `because the correct option is C`"""
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
_NUMERAL = re.compile(r"[0-9]|\\(?:frac|sqrt|pi)")
_SO = re.compile(r"^(?:so|thus|hence|therefore)\b,?\s+", re.IGNORECASE)
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
    is_text = _key(answer) in map(_key, options.values())
    if len(answer) == 1 and not is_text and _enclosed(shown) is not None:  # else the article `a`
        answer = answer.upper()
    said = _phrasings(answer, options)
    return float(any(_right(one, letter, text, options) for one in said))


def _phrasings(answer: str, options: Mapping[str, str]) -> Iterator[str]:
    """A choice as it is said, then without the reason and the verdict behind it."""
    yield answer
    if _is_any(answer, options):  # `P and not Q` may be one, and `P` another
        return
    short = _without_reason(answer)
    yield short
    if (verdict := _IS_RIGHT.fullmatch(short)) and not _BY_LETTER.search(verdict["choice"]):
        yield verdict["choice"]


def _without_reason(answer: str) -> str:
    """Without what is said for it, unless that is said for another letter."""
    reason = _REASON.search(answer)
    if reason is None:
        return answer
    short = answer[: reason.start()]
    return answer if _claims_another(reason.group(), short) else short


def _claims_another(text: str, short: str) -> bool:
    letters = (one["first"] or one["last"] for one in _CLAIMED.finditer(text))
    return any(not re.search(rf"\b{letter}\b", short) for letter in letters)


def _right(answer: str, letter: str, text: str, options: Mapping[str, str]) -> bool:
    if answer in options and answer.isalpha():  # a label, though it be another option's text
        return answer == letter
    if text and _is_spelled(answer, text, options):
        return True
    if (label := _LABEL.fullmatch(answer)) and label[1] in options:
        rest = label[2].strip()
        return label[1] == letter and (not rest or not text or _same(rest, text, options))
    if text and _same(answer, text, options):
        return True
    marked = _MARKED.fullmatch(answer)
    if marked is None:
        besides = filter(None, (form.fullmatch(answer) for form in _BESIDE))
        return bool(text) and any(
            one["letter"] == letter and _same(one["text"], text, options) for one in besides
        )
    rest = (marked["rest"] or "").strip()
    if (marked["bare"] or "").islower() or _letter(marked) != letter:
        return False
    if rest and text:  # else it may be the letter of one option and the text of another
        return _same(rest, text, options) or _is_about(rest, letter, text, options)
    if marked["dashed"] and _NOT.search(rest):  # `B - Paris, not correct`
        return False
    return not (_ANOTHER.search(rest) or _REFUTED.match(rest) or _claims_another(rest, letter))


def _is_about(rest: str, letter: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether a sentence about the option's text, and no other's, stands behind its letter."""
    begin = plain(text).casefold()
    tail = rest[len(begin) :]
    if not rest.casefold().startswith(begin) or not _GOES_ON.match(tail) or _DOUBTED.search(tail):
        return False
    words = f" {_key(tail)} ".casefold()
    others = {one: other for one, other in options.items() if one != letter}
    return not any(
        re.search(rf"(?<!\w){re.escape(_key(other).casefold())}(?!\w)", words)
        or re.search(rf"\b{re.escape(one)}\b", tail)
        for one, other in others.items()
    )


def _letter(marked: re.Match[str]) -> str:
    found = marked.group("bare", "bracketed", "marked", "dashed")
    return next(filter(None, found)).upper()


def _same(found: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether it is an option's text; a number may be written otherwise, if no other is meant."""
    if _is_spelled(found, text, options):
        return True
    if not _NUMERAL.search(text) or _is_any(found, options):
        return False
    return [one for one in {text, *options.values()} if _same_number(one, found)] == [text]


def _is_spelled(found: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether it is the text, in any case if the texts of no two options differ by that."""
    key, keys = _key(found), {_key(one) for one in (text, *options.values())}
    if key not in keys:
        keys, key = {one for one in keys if one.casefold() == key.casefold()}, _key(text)
        return keys == {key}
    return key == _key(text)


def _is_any(found: str, options: Mapping[str, str]) -> bool:
    return _key(found).casefold() in (_key(one).casefold() for one in options.values())


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
    if spelled in options and spelled.isalpha():
        return spelled, options[spelled]
    for letter, text in options.items():
        if _is_spelled(spelled, text, options):
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
    short = _without_reason(line.rstrip(".!* "))
    verdict = _IS_RIGHT.fullmatch(short)
    if verdict and (
        _MARKED.fullmatch(verdict["choice"]) or not _CHOICE_IS.search(verdict["choice"])
    ):
        return short
    kinds = (cue.finditer(line) for cue in (_ANSWER_IS, _CHOICE_IS, _I_CHOOSE))
    cues = next(filter(None, ([one for one in kind if _is_cue(one)] for kind in kinds)), [])
    if not cues:
        return _SO.sub("", line).strip("* ") or None
    end = cues[-1].end()
    if _NOT.search(_CLAUSE.split(line[:end].rstrip(": "))[-1]) or _LISTED.search(
        line, 0, cues[-1].start()
    ):
        return None
    return line[end:].strip("* ") or None


def _is_cue(found: re.Match[str]) -> bool:
    """Whether what follows is chosen: not so in `A is better than option B`."""
    if found.re is not _CHOICE_IS or found["is"]:
        return True
    before = found.string[: found.start()]
    led = _LED.search(before)
    return led is not None and not (led["aside"] and _DISCARDED.search(before))


def _enclosed(text: str) -> str | None:
    """What is in its last box, else in its last tags."""
    boxed = last_boxed(text)
    return tagged(text) if boxed is None else boxed


def _key(text: str) -> str:
    """Without the points of abbreviations; one beside a digit counts, as case does."""
    return re.sub(r"(?:\s|(?<![0-9])\.(?![0-9])|\.$)+", " ", plain(text)).strip()
