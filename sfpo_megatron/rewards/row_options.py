"""The options that a row offers, and which of them a text is: by its letter, its label or what it
says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sfpo_megatron.rewards.answers import readings
from sfpo_megatron.rewards.boxes import last_boxed
from sfpo_megatron.rewards.equality import equal
from sfpo_megatron.rewards.notation import plain
from sfpo_megatron.rewards.quantities import Value
from sfpo_megatron.types import Json

MARKED = re.compile(
    r"(?:(?:option|choice|answer)\s+)?"
    r"(?:(?P<bare>[A-Z])|(?:[(\[{]+\s*(?P<bracketed>[A-Z])\s*[)\]}]+[.:]?|(?P<marked>[A-Z])\s*[).:]"
    r"|(?-i:(?P<dashed>[A-Z]))\s+-+(?=\s))"
    r"(?:(?:\s+|(?<=[)\]}])|(?<=[.:])(?-i:(?=[^\sA-Za-z]|[A-Z][a-z])))(?P<rest>.*))?)",
    re.DOTALL | re.IGNORECASE,
)
"""`B`, `(B)`, `B. Paris`, `B)21`, `option B`; `D.C.` is none."""
LABEL = re.compile(r"\(?\s*([0-9]{1,2})\s*(?:[).:]|$)\s*(.*)", re.DOTALL)
"""`2`, `(2)`, `2. green`: of a row whose choices have numbers for labels."""
_NUMERAL = re.compile(r"[0-9]|\\(?:frac|sqrt|pi)")


def options_of(choices: Json) -> dict[str, str]:
    """Label -> text, of a row's `choices`; empty if it has none. `["A)21", "B)22"]` is 21 and 22:
    no text says its own label where all do."""
    options = _as_they_stand(choices)
    texts = [_behind(label, text) for label, text in options.items()]
    return dict(zip(options, texts, strict=True)) if all(texts) else options


def _behind(label: str, text: str) -> str:
    """What stands behind an option's own label; "" where its text does not begin with that. A
    point behind a number may be the decimal one."""
    end = r"[)\].:]" if label.isalpha() else r"(?:[)\]]|[.:](?=\s))"
    found = re.fullmatch(
        rf"\s*[(\[]?\s*{re.escape(label)}\s*{end}[.:]?(.*)", text, re.DOTALL | re.IGNORECASE
    )
    return found[1].strip() if found else ""


def _as_they_stand(choices: Json) -> dict[str, str]:
    if isinstance(choices, Mapping):
        texts, labels = choices.get("text"), choices.get("label")
        if isinstance(texts, Sequence) and isinstance(labels, Sequence):
            letters = (str(label).upper() for label in labels)
            return dict(zip(letters, map(str, texts), strict=False))
        return {str(letter).upper(): str(text) for letter, text in choices.items()}
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        return {chr(ord("A") + index): str(text) for index, text in enumerate(choices[:26])}
    return {}


def reference_of(answer: str, options: Mapping[str, str]) -> tuple[str, str]:
    """The letter of a row's answer and its text, "" if the row does not say. ValueError for an
    answer that is no option."""
    spelled = plain(last_boxed(answer) or answer)
    if spelled in options and spelled.isalpha():
        return spelled, options[spelled]
    for letter, text in options.items():
        if is_spelled(spelled, text, options):
            return letter, text
    if (label := LABEL.fullmatch(spelled)) and label[1] in options:
        return label[1], options[label[1]]
    for letter, text in options.items():
        if is_text(spelled, text, options):
            return letter, text
    marked = MARKED.fullmatch(spelled)
    if marked is None:
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected the letter of an option, such as E or "
            "'E. 42', or one of the row's `choices`; use reward.function=exact_match or math"
        )
    letter = letter_of(marked)
    if options and letter not in options:
        raise ValueError(
            f"answer: found {answer[:200]!r}, expected one of the row's `choices` "
            f"({', '.join(options)}); correct either"
        )
    return letter, (marked["rest"] or "").strip() or options.get(letter, "")


def letter_of(marked: re.Match[str]) -> str:
    """The letter of a match of MARKED."""
    found = marked.group("bare", "bracketed", "marked", "dashed")
    return next(filter(None, found)).upper()


def is_text(found: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether it is an option's text; a number may be written otherwise, if no other is meant."""
    if is_spelled(found, text, options):
        return True
    if not _NUMERAL.search(text) or is_any(found, options):
        return False
    return [one for one in {text, *options.values()} if _same_number(one, found)] == [text]


def is_spelled(found: str, text: str, options: Mapping[str, str]) -> bool:
    """Whether it is the text, in any case if the texts of no two options differ by that."""
    key, keys = key_of(found), {key_of(one) for one in (text, *options.values())}
    if key not in keys:
        keys, key = {one for one in keys if one.casefold() == key.casefold()}, key_of(text)
        return keys == {key}
    return key == key_of(text)


def is_any(found: str, options: Mapping[str, str]) -> bool:
    """Whether it is the text of any option, in any case."""
    return key_of(found).casefold() in (key_of(one).casefold() for one in options.values())


def _same_number(text: str, found: str) -> bool:
    numbers = [one for one in readings(text) if isinstance(one, Value)]
    return any(equal(one, other) for one in numbers for other in readings(found))


def key_of(text: str) -> str:
    """The text as it is compared: without the points of abbreviations; one beside a digit counts,
    as case does."""
    return re.sub(r"(?:\s|(?<![0-9])\.(?![0-9])|\.$)+", " ", plain(text)).strip()
