"""What a response says of its choice: where it names one, its reasons and verdicts beside that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from sfpo_megatron.rewards.boxes import last_boxed
from sfpo_megatron.rewards.row_options import MARKED, is_any
from sfpo_megatron.rewards.tagged import tagged

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
NOT = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|false|rather than|instead of|"
    r"if|unless|whether|doubt|suppose|assume|mistake|distractor|no longer|hardly|barely)\b|n't\b"
    r"|\b(?:least|worst|bad|second|next|another|other|alternative)[\s-]+(?:\w+\s+)?"
    r"(?:answer|choice|option)\b",
    re.IGNORECASE,
)
"""What makes a sentence about a letter no choice of it."""
_CLAUSE = re.compile(
    r"[.,;:!?]|\b(?:so|thus|hence|therefore|but|and|because|since)\b", re.IGNORECASE
)
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
_SO = re.compile(r"^(?:so|thus|hence|therefore)\b,?\s+", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*]+)\*\*(?!\w)")
"""`**B**`, also before a full stop; `2**3` is none."""
_LINE_CHARS = 2000


def chosen(text: str) -> str | None:
    """What a response, without its thinking, chooses, as it is written; None if nothing."""
    said = enclosed(text)
    if said is not None:
        return said
    line = _BOLD.sub(r"\1", text.strip().rsplit("\n", 1)[-1][-_LINE_CHARS:]).strip()
    short = _without_reason(line.rstrip(".!* "))
    verdict = _IS_RIGHT.fullmatch(short)
    if verdict and (
        MARKED.fullmatch(verdict["choice"]) or not _CHOICE_IS.search(verdict["choice"])
    ):
        return short
    kinds = (cue.finditer(line) for cue in (_ANSWER_IS, _CHOICE_IS, _I_CHOOSE))
    cues = next(filter(None, ([one for one in kind if _is_cue(one)] for kind in kinds)), [])
    if not cues:
        return _SO.sub("", line).strip("* ") or None
    end = cues[-1].end()
    if NOT.search(_CLAUSE.split(line[:end].rstrip(": "))[-1]) or _LISTED.search(
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


def phrasings(answer: str, options: Mapping[str, str]) -> Iterator[str]:
    """A choice as it is said, then without the reason and the verdict behind it."""
    yield answer
    if is_any(answer, options):  # `P and not Q` may be one, and `P` another
        return
    short = _without_reason(answer)
    yield short
    if (verdict := _IS_RIGHT.fullmatch(short)) and not _BY_LETTER.search(verdict["choice"]):
        yield verdict["choice"]


def _without_reason(answer: str) -> str:
    """Leave out what is said for it, unless that is said for another letter."""
    reason = _REASON.search(answer)
    if reason is None:
        return answer
    short = answer[: reason.start()]
    return answer if claims_another(reason.group(), short) else short


def claims_another(text: str, short: str) -> bool:
    """Whether it says that a letter is right which the choice itself does not name."""
    letters = (one["first"] or one["last"] for one in _CLAIMED.finditer(text))
    return any(not re.search(rf"\b{letter}\b", short) for letter in letters)


def enclosed(text: str) -> str | None:
    """What is in its last box, else in its last tags."""
    boxed = last_boxed(text)
    return tagged(text) if boxed is None else boxed
