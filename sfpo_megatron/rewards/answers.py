r"""How the text of an answer is read, as the kinds of answer_kinds.py.

`readings` gives every way in which a text can be read; two answers are equal if two of their
readings are (`equality.py`). What cannot be read as mathematics is a `Text`, which equals the same
text alone: a sentence, `71. The answer is 72`, earns nothing against a number.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from sfpo_megatron.rewards import matrices, numbers
from sfpo_megatron.rewards.answer_kinds import Answer, Chain, Choice, Group, Matrix, Named, Text
from sfpo_megatron.rewards.hostile import refused
from sfpo_megatron.rewards.notation import all_but, plain, without_ordinals
from sfpo_megatron.rewards.quantities import GROUPED, Value, quantity, value_of
from sfpo_megatron.rewards.splitting import balanced, split

MAX_ITEMS = 100

_SEPARATOR = re.compile(
    r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|[,;]|\\(?:lor|land|vee|wedge)(?![A-Za-z])"
)
_SIGN = re.compile(r"\\(?:implies|iff|approx|equiv|le|ge|ne|in)(?![A-Za-z])|[=<>]")
_SEMICOLON = re.compile(";")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_BUILDER = re.compile(
    r"\s*[A-Za-z](?:_\w)?\s*(?:\\in\s*\\reals\s*)?[|:](.*(?:[<>=]|\\(?:le|ge|ne|in)(?![A-Za-z])).*)",
    re.DOTALL,
)
"""`x | x > 2` in the braces of a set: its condition."""
_QUOTED = re.compile(r"\"[^\"]+\"|'[^']+'")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_CONJUNCTION = re.compile(r"(?:and|\\land|\\wedge)$")
_WITHOUT = re.compile(r"\\(?:setminus|backslash)(?![A-Za-z])")
_ALL_REALS = re.compile(r"\\reals|(?:the set of )?(?:all )?real numbers?|all reals", re.IGNORECASE)
_VARIABLE = r"(?:[A-Za-z]|\\(?!pi\b|infty\b)[a-z]+ ?)(?:_\{?\w+\}?)?"
_NAME = re.compile(
    r"(?:\\(?:vec|overrightarrow|overline|hat|bar)\{?[A-Za-z ]+\}?|\\(?:angle|triangle) ?[A-Z]+|"
    r"\|[A-Z]{2}\||\\frac\{[A-Z]{2,}\}\{[A-Z]{2,}\}|"
    r"[A-Z](?:_\{?\w+\}?)? ?: ?[A-Z](?:_\{?\w+\}?)?|(?:[A-Zf-h]|\\phi ?)'*\(-?[0-9]+\)|"
    r"\\?[A-Za-z]+'?(?:_(?:\{[^{}]*\}|\w))?(?:\^\{?-1\}?)?(?:\((?:[A-Za-z](?:, ?[A-Za-z])*)\))?|"
    rf"(?:[A-Za-z]+ )+[A-Za-z]+|\({_VARIABLE}(?:, ?{_VARIABLE})+\))"
)
_MONTH_DAY = r"(?:0?[1-9]|[12][0-9]|3[01])"
_DATE = re.compile(
    rf"[12][0-9]{{3}}([-/]){_MONTH_DAY}\1{_MONTH_DAY}|{_MONTH_DAY}([-/]){_MONTH_DAY}\2[12][0-9]{{3}}"
)
"""`2024-01-05`, `5/6/2020`: no difference and no quotient."""
_LETTERS = re.compile("(?!pi$)[A-Za-z]{2,}")
_FONTED = re.compile(r"\\(?:text[a-z]*|mathrm|mbox|operatorname)\s*\{\s*([^{}]*?)\s*\}")
"""Letters that are set as a word, and not as a product of variables."""
_IN_ORDER = re.compile("[A-Z]{3,}|[A-Z](?: [A-Z]){2,}|[IVXLCDM]{2}|TF|FT")
"""An ordering, vertices, a Roman numeral, true and false: as a product any order would do."""
_OPERATOR = re.compile(r"\\[A-Za-z]|[\^_+*/]")
_WORD = re.compile("[A-Za-z]+")
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])(?=[).:])[).:]|([A-J])(?=$))\s*(.*)",
    re.IGNORECASE,
)
_MORE_CHOICES = re.compile(r"(?:^|[\s(])[A-J][).:](?:\s|$)")
_LATER_ZERO = re.compile(r":\s*0[0-9]")
"""`9:05` is a time of day: no ratio is written so."""
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
"""Sign of an inequality -> that of the same one read from the other side."""
_BELOW = ("<", r"\le")
_PAIRS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


@functools.lru_cache(maxsize=4096)
def readings(text: str) -> tuple[Answer, ...]:
    """All ways to read an answer; none for an empty one and one that `screen` refuses."""
    if refused(text) is not None:
        return ()
    spelled = plain(text)
    if not spelled or refused(spelled) is not None:
        return ()
    number = without_ordinals(spelled).strip()
    if number != spelled:  # `2nd` may be a product too
        return (*_spelled_readings(number, text), *_spelled_readings(spelled, text))
    return _spelled_readings(spelled, text)


def _spelled_readings(spelled: str, text: str) -> tuple[Answer, ...]:
    """All ways to read one spelling of the text."""
    if number := numbers.read(spelled):
        found: list[Answer] = [Value(exact=number.value, written=number.written)]
        if GROUPED.fullmatch(spelled) and ",0" not in spelled:  # `100,200` may be two numbers
            found.append(Group(items=tuple(map(_read, spelled.split(",")))))
        return tuple(found)
    joined = GROUPED.sub(lambda number: number[1] + number[2].replace(",", ""), spelled)
    # In brackets `(100,200)` is a pair; outside, or beside commas with a space, 100200.
    apart = spelled.startswith(("(", "[", "{", r"\{")) and ", " not in spelled
    read = [_read(spelled if apart else joined)]
    set_words = frozenset(_FONTED.findall(text))
    first = read[0] = _as_set(read[0], set_words) if set_words else read[0]
    if isinstance(first, Value) and first.unit and (product := value_of(spelled)):
        read.append(product)  # `5 m` may be five times m
    if isinstance(first, Value) and _LETTERS.fullmatch(spelled):
        read.append(Text(words=spelled, cased=spelled))  # in its case: `AB` is not `ab`
    choice = _choice(spelled)
    return tuple([*read, choice] if choice else read)


def _as_set(answer: Answer, words: frozenset[str]) -> Answer:
    """The answer with each of these words as one, wherever in it they stand."""
    match answer:
        case Value(letters=word) if word in words and _LETTERS.fullmatch(word):
            return Text(words=word, cased=word, is_set=True)
        case Text(cased=word) if word in words:
            return replace(answer, is_set=True)
        case Named():
            return replace(answer, value=_as_set(answer.value, words))
        case Group():
            return replace(answer, items=tuple(_as_set(item, words) for item in answer.items))
        case Matrix():
            rows = (tuple(_as_set(item, words) for item in row) for row in answer.rows)
            return replace(answer, rows=tuple(rows))
        case _:
            return answer


def _read(text: str, depth: int = 0) -> Answer:
    text = all_but(text.strip())
    if depth > 20 or not text:
        return _text(text)
    if number := numbers.read(text):
        return Value(exact=number.value, written=number.written)
    if _DATE.fullmatch(text):
        return _text(re.sub(r"(?<![0-9])0(?=[0-9])", "", text))
    if _IN_ORDER.fullmatch(text) and value_of(text):
        letters = text.replace(" ", "")
        return Text(words=letters, cased=letters)
    if rows := matrices.entries(text):
        if len(rows) == len(rows[0]) == 1:
            return _read(rows[0][0], depth + 1)
        return Matrix(rows=tuple(tuple(_read(one, depth + 1) for one in row) for row in rows))
    if value := matrices.determinant(text):
        return value
    items = split(text, _SEMICOLON)[0]
    if len(items) > 1 and "," in text:  # `x=1, y=2; x=3, y=4`: a list of pairs
        pairs = [_read(item, depth + 1) for item in items if item.strip()]
        return Group(items=tuple(_as_tuple(pair) for pair in pairs))
    items, separators = split(text, _SEPARATOR)
    several = 1 < len(items) <= MAX_ITEMS and all(item.strip() for item in items)
    if several and not _is_prose(text):
        read = [_read(item, depth + 1) for item in items]
        if all(_CONJUNCTION.search(one) for one in separators) and _are_conditions(read):
            return _both_hold(read) or _text(text)
        return Group(items=_flat(read))
    sides, signs = split(text, _SIGN)
    if len(sides) > 1 and not (sides[0] == "" and signs[0] == "="):
        return _relation(sides, signs, depth)
    if sides[0] == "" and len(sides) == 2:
        return _read(sides[1], depth + 1)
    if _ALL_REALS.fullmatch(text):
        return _read(r"(-\infty, \infty)", depth + 1)
    if text.startswith(r"\{") and (group := _bracketed(text, depth)):
        return group
    for sign, opening in ((_CUP, "u"), (_WITHOUT, "-")):
        parts = split(text, sign)[0]
        if 1 < len(parts) <= MAX_ITEMS:
            return Group(items=tuple(_braced(part, depth + 1) for part in parts), opening=opening)
    if _PLUS_MINUS.search(text):
        return _both_signs(text, depth)
    if group := _bracketed(text, depth):
        return group
    if _QUOTED.fullmatch(text):  # `["42"]`: a list as JSON or Python has it
        return _read(text[1:-1], depth + 1)
    ratio = text.split(":")
    is_ratio = len(ratio) > 1 and not _LATER_ZERO.search(text)
    if is_ratio and all(numbers.read(part.strip()) for part in ratio):
        return Group(items=tuple(_read(p, depth + 1) for p in ratio), opening=":", closing=":")
    return quantity(text) or value_of(text) or _text(text)


def _as_tuple(pair: Answer) -> Answer:
    if isinstance(pair, Group) and not pair.opening:
        return Group(items=pair.items, opening="(", closing=")")
    return pair


def _braced(part: str, depth: int) -> Answer:
    """Part of a union: `\\{0\\}` is a set there, not 0."""
    read = _read(part, depth)
    if not part.strip().startswith(r"\{"):
        return read
    if isinstance(read, Value):
        return Group(items=(read,), opening="{", closing="}")
    if isinstance(read, Group) and not read.opening:  # `\{\pm 2\}`
        return Group(items=read.items, opening="{", closing="}")
    return read


def _are_conditions(read: list[Answer]) -> bool:
    """Whether they are inequalities, as intervals, of one variable."""
    named = [one for one in read if isinstance(one, Named)]
    return (
        len(named) == len(read)
        and len({one.name for one in named}) == 1
        and all(isinstance(one.value, Group) and one.value.opening in "([" for one in named)
    )


def _both_hold(read: list[Answer]) -> Answer | None:
    """`x > 1` and `x < 3` is (1, 3); None where no number is in all of the intervals."""
    import sympy

    name, both = "", sympy.S.Reals
    for one in read:
        assert isinstance(one, Named) and isinstance(one.value, Group)
        ends = [sympy.sympify(end.exact) for end in one.value.items if isinstance(end, Value)]
        if len(ends) != 2 or not all(end.is_extended_real for end in ends):
            return None
        opened, closed = one.value.opening == "(", one.value.closing == ")"
        name, both = one.name, both & sympy.Interval(*ends, left_open=opened, right_open=closed)
    if not isinstance(both, sympy.Interval):
        return None
    opening = "(" if both.left_open else "["
    closing = ")" if both.right_open else "]"
    bounds = tuple(Value(exact=end) for end in (both.start, both.end))
    return Named(name=name, value=Group(items=bounds, opening=opening, closing=closing))


def _flat(items: list[Answer]) -> tuple[Answer, ...]:
    """`\\pm 1, \\pm 2` is a list of four."""
    flat: list[Answer] = []
    for item in items:
        flat += item.items if isinstance(item, Group) and not item.opening else [item]
    return tuple(flat)


def _relation(sides: list[str], signs: list[str], depth: int) -> Answer:
    if len(sides) > MAX_ITEMS or any(not side.strip() for side in sides):
        return _text(" ".join(sides))
    if (
        not {r"\implies", r"\iff"} & {*signs}
        and signs[0] in ("=", r"\in", r"\approx", r"\equiv")
        and _NAME.fullmatch(sides[0].strip())
        and not (signs[0] == r"\approx" and sides[0].strip() in (r"\pi", "e"))
    ):
        rest = sides[1:]
        name = re.sub(r"[\s{}]", "", sides[0])
        value = (
            _read(rest[0], depth + 1) if len(rest) == 1 else _relation(rest, signs[1:], depth + 1)
        )
        return Named(name=name, value=value, sign=signs[0])
    if signs == ["="] and _NAME.fullmatch(sides[1].strip()):  # `5 = x`
        return _relation(sides[::-1], signs, depth)
    chain = Chain(sides=tuple(_read(side, depth + 1) for side in sides), signs=tuple(signs))
    return _as_interval(chain, [side.strip() for side in sides]) or chain


def _as_interval(chain: Chain, texts: list[str]) -> Answer | None:
    """`1 < x \\le 2` is the interval (1, 2], by name."""
    import sympy

    sides, signs = list(chain.sides), list(chain.signs)
    if any(sign not in FLIPPED for sign in signs) or len(sides) > 3:
        return None
    if len(sides) == 2 and _NAME.fullmatch(texts[0]):  # `x < 5` is `-\\infty < x < 5`
        is_below = signs[0] in _BELOW
        bound = Value(exact=-sympy.oo if is_below else sympy.oo)
        sides, texts, signs = [bound, *sides], ["", *texts], ["<" if is_below else ">", *signs]
    elif len(sides) == 2:
        is_below = signs[0] in _BELOW
        bound = Value(exact=sympy.oo if is_below else -sympy.oo)
        sides, texts, signs = [*sides, bound], [*texts, ""], [*signs, "<" if is_below else ">"]
    if signs[0] not in _BELOW:
        sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    if any(sign not in _BELOW for sign in signs) or not _NAME.fullmatch(texts[1]):
        return None
    return Named(
        name=texts[1],
        value=Group(
            items=(sides[0], sides[2]),
            opening="(" if signs[0] == "<" else "[",
            closing=")" if signs[1] == "<" else "]",
        ),
    )


def _both_signs(text: str, depth: int) -> Answer:
    both = [
        _PLUS_MINUS.sub(lambda sign: "+" if sign.group() == r"\pm" else "-", text),
        _PLUS_MINUS.sub(lambda sign: "-" if sign.group() == r"\pm" else "+", text),
    ]
    return Group(items=tuple(_read(one.strip().removeprefix("+"), depth + 1) for one in both))


def _bracketed(text: str, depth: int) -> Answer | None:
    if text[:1] == "]" or (text[:1] in "([" and text[-1:] == "["):
        text = _as_english(text)
    opening = text[:2] if text.startswith(r"\{") else text[:1]
    if opening not in _PAIRS:
        return None
    closing = r"\}" if text.endswith(r"\}") else text[-1:]
    inner = text[len(opening) : len(text) - len(closing)]
    curly = {"{", r"\{", "}", r"\}"}
    if (opening in curly) != (closing in curly) or closing not in _PAIRS.values():
        return None
    if len(text) < 2 or not balanced(inner):
        return None
    if not inner.strip():
        return _text(text)
    if opening == r"\{" and (builder := _BUILDER.fullmatch(inner)):
        return _read(builder[1], depth + 1)
    items = split(inner, re.compile("[,;]"))[0]
    if len(items) == 1:  # brackets around one thing, `\{72\}` and `(72)` too, are no more than it
        return _read(inner, depth + 1) if closing == _PAIRS[opening] else None
    if len(items) > MAX_ITEMS or not all(item.strip() for item in items):
        return None
    opening, closing = opening.removeprefix("\\"), closing.removeprefix("\\")
    read = [_read(item, depth + 1) for item in items]
    return Group(
        items=_flat(read) if opening == "{" else tuple(read), opening=opening, closing=closing
    )


def _as_english(interval: str) -> str:
    """`]2, 5[` is (2, 5) in much of Europe (ISO 80000-2)."""
    opening = "(" if interval[0] == "]" else interval[0]
    return opening + interval[1:-1] + (")" if interval[-1] == "[" else interval[-1])


def _choice(text: str) -> Choice | None:
    found = _CHOICE.fullmatch(text)
    if found is None or _MORE_CHOICES.search(found[4]):
        return None
    bare = found[3]
    if bare and (bare.islower() or found[4]):
        return None
    letter = found[1] or found[2] or bare
    return Choice(letter=letter.upper(), text=found[4].strip())


def _text(text: str) -> Text:
    words = re.sub(r"\s+", " ", re.sub(r"[\"'.!]+$", "", text)).strip()
    words = re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", words)  # `\setminus \{0\}`
    # `GMm` is not `Gmm`: a formula's letters are not a word's, whose case varies as a whole.
    runs = _WORD.findall(words)
    is_formula = (
        _OPERATOR.search(re.sub(r"(?<=[A-Za-z]{2})/(?=[A-Za-z]{2})", "", words))  # `Yes/No` is none
        or not all(run.islower() or run.isupper() or run.istitle() for run in runs)
    )
    return Text(words=words if is_formula else words.casefold(), cased=words)


def _is_prose(text: str) -> bool:
    """A sentence with figures in it: `71. The answer is 72`."""
    return re.search(r"[0-9A-Za-z]\.\s+[A-Z]", text) is not None
