r"""What an answer is: a number, an expression, a list, an interval, a relation, a choice, a text.

`readings` gives every way in which a text can be read; two answers are equal if two of their
readings are (`equality.py`). What cannot be read as mathematics is a `Text`, which equals the same
text alone: a sentence, `71. The answer is 72`, earns nothing against a number.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

from sfpo_megatron.rewards import numbers
from sfpo_megatron.rewards.expressions import Unreadable, expression
from sfpo_megatron.rewards.notation import plain
from sfpo_megatron.rewards.numbers import Written
from sfpo_megatron.rewards.screen import refused
from sfpo_megatron.rewards.units import unit_of, without_braces

if TYPE_CHECKING:
    from sympy import Expr

MAX_ITEMS = 100
MAX_QUANTITY_CHARS = 300


@dataclass(kw_only=True, frozen=True, slots=True)
class Value:
    """A number or an expression, with what stands behind it."""

    exact: Fraction | Expr
    written: Written | None = None
    unit: str = ""
    percent: bool = False


@dataclass(kw_only=True, frozen=True, slots=True)
class Text:
    """Words, or what could not be read; case and space do not count."""

    words: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Group:
    """A list without brackets (both ""), a set, a tuple, an interval, a union (`opening` "u")."""

    items: tuple[Answer, ...]
    opening: str = ""
    closing: str = ""


@dataclass(kw_only=True, frozen=True, slots=True)
class Chain:
    """Sides with `=`, an inequality or an implication between them."""

    sides: tuple[Answer, ...]
    signs: tuple[str, ...]


@dataclass(kw_only=True, frozen=True, slots=True)
class Named:
    """`x = 5`: a name and what it is."""

    name: str
    value: Answer


@dataclass(kw_only=True, frozen=True, slots=True)
class Choice:
    """`E`, `(E)`, `E. 42`: the letter of an option, and its text if it is there."""

    letter: str
    text: str = ""


@dataclass(kw_only=True, frozen=True, slots=True)
class Matrix:
    """Rows of a matrix, or of a vector."""

    rows: tuple[tuple[Answer, ...], ...]


Answer: TypeAlias = Value | Text | Group | Chain | Named | Choice | Matrix

_GROUPED = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2})((?:,[0-9]{3})+)(?![0-9]|,[0-9])")
_SEPARATOR = re.compile(
    r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|[,;]|\\(?:lor|land|vee|wedge)(?![A-Za-z])"
)
_SIGN = re.compile(r"\\(?:implies|approx|equiv|le|ge|ne|in)(?![A-Za-z])|[=<>]")
_SEMICOLON = re.compile(";")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_TOKEN = re.compile(r"\\[{}|]|\\[A-Za-z]+|\\.|[(\[{)\]}]|[^\\(\[{)\]}]", re.DOTALL)
_NAME = re.compile(
    r"(?:\\(?:vec|overrightarrow|overline|hat|bar)\{?[A-Za-z ]+\}?|\\(?:angle|triangle) ?[A-Z]+|"
    r"\|[A-Z]{2}\||\\frac\{[A-Z]{2,}\}\{[A-Z]{2,}\}|"
    r"[A-Z](?:_\{?\w+\}?)? ?: ?[A-Z](?:_\{?\w+\}?)?|"
    r"\\?[A-Za-z]+'?(?:_(?:\{[^{}]*\}|\w))?(?:\((?:[A-Za-z](?:, ?[A-Za-z])*)\))?|"
    r"(?:[A-Za-z]+ )+[A-Za-z]+|\([A-Za-z](?:_\{?\w+\}?)?(?:, ?[A-Za-z](?:_\{?\w+\}?)?)+\))"
)
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])(?=[).:])[).:]|([A-J])(?=$))\s*(.*)",
    re.IGNORECASE,
)
_MORE_CHOICES = re.compile(r"(?:^|[\s(])[A-J][).:](?:\s|$)")
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{matrix\}(.*)\\end\{matrix\}\s*[)\]]?", re.DOTALL)
_QUANTITY = re.compile(
    r"(?P<value>.*?(?:[0-9)}\]!.]|\\pi(?![A-Za-z])))(?P<space>\s*)"
    r"(?P<unit>(?!\\pi(?![A-Za-z]))\\?[A-Za-z][^0-9{}()]*(?:\^\{?\s*-?[0-9]\s*\}?)?(?:\s*(?:/|\\cdot)\s*[A-Za-z]+(?:\^\{?-?[0-9]\}?)?)*)"
)
_DEGREES = re.compile(r"(.*?)\s*\^\\circ\s*(C|F|K|[Cc]elsius|[Ff]ahrenheit)?")
_CURRENCY = re.compile(r"(-?)\s*(\\(?:dollar|euro|pound|yen|rupee))\s*(-?)(.*)")
_HEAVY = re.compile(r"\\(?:sum|int|prod|lim)(?![A-Za-z])")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
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
    if number := numbers.read(spelled):
        found: list[Answer] = [Value(exact=number.value, written=number.written)]
        if _GROUPED.fullmatch(spelled) and ",0" not in spelled:
            found.append(_read(spelled))
        return tuple(found)
    texts = [spelled]
    joined = _GROUPED.sub(lambda number: number[1] + number[2].replace(",", ""), spelled)
    if joined != spelled:
        # In brackets `(100,200)` is a pair; outside, or beside commas with a space, 100200.
        apart = spelled.startswith(("(", "[", "{", r"\{")) and ", " not in spelled
        texts = [spelled] if apart else [joined]
    read = [_read(text) for text in texts]
    first = read[0]
    if isinstance(first, Value) and first.unit and (product := _value(spelled)):
        read.append(product)  # `5 m` may be five times m
    choice = _choice(spelled)
    return tuple([*read, choice] if choice else read)


def _read(text: str, depth: int = 0) -> Answer:
    text = text.strip()
    if depth > 20 or not text:
        return _text(text)
    if number := numbers.read(text):
        return Value(exact=number.value, written=number.written)
    if matrix := _MATRIX.fullmatch(text):
        rows = (row for row in re.split(r"\\\\", matrix[1]) if row.strip())
        return Matrix(
            rows=tuple(tuple(_read(c, depth + 1) for c in row.split("&")) for row in rows)
        )
    items = _split(text, _SEMICOLON)[0]
    if len(items) > 1 and "," in text:  # `x=1, y=2; x=3, y=4`: a list of pairs
        pairs = [_read(item, depth + 1) for item in items if item.strip()]
        return Group(items=tuple(_as_tuple(pair) for pair in pairs))
    items = _split(text, _SEPARATOR)[0]
    several = 1 < len(items) <= MAX_ITEMS and all(item.strip() for item in items)
    if several and not _is_prose(text):
        return Group(items=_flat([_read(item, depth + 1) for item in items]))
    sides, signs = _split(text, _SIGN)
    if len(sides) > 1 and not (sides[0] == "" and signs[0] == "="):
        return _relation(sides, signs, depth)
    if sides[0] == "" and len(sides) == 2:
        return _read(sides[1], depth + 1)
    if _PLUS_MINUS.search(text):
        return _both_signs(text, depth)
    parts = _split(text, _CUP)[0]
    if len(parts) > 1:
        return Group(items=tuple(_read(part, depth + 1) for part in parts), opening="u")
    if group := _bracketed(text, depth):
        return group
    ratio = text.split(":")
    if len(ratio) > 1 and all(numbers.read(part.strip()) for part in ratio):
        return Group(items=tuple(_read(p, depth + 1) for p in ratio), opening=":", closing=":")
    return _quantity(text) or _value(text) or _text(text)


def _as_tuple(pair: Answer) -> Answer:
    if isinstance(pair, Group) and not pair.opening:
        return Group(items=pair.items, opening="(", closing=")")
    return pair


def _flat(items: list[Answer]) -> tuple[Answer, ...]:
    """`\\pm 1, \\pm 2` is a list of four."""
    flat: list[Answer] = []
    for item in items:
        flat += item.items if isinstance(item, Group) and not item.opening else [item]
    return tuple(flat)


def _relation(sides: list[str], signs: list[str], depth: int) -> Answer:
    if any(not side.strip() for side in sides):
        return _text(" ".join(sides))
    if (
        r"\implies" not in signs
        and signs[0] in ("=", r"\in", r"\approx")
        and _NAME.fullmatch(sides[0].strip())
    ):
        rest = sides[1:]
        name = re.sub(r"[\s{}]", "", sides[0])
        value = (
            _read(rest[0], depth + 1) if len(rest) == 1 else _relation(rest, signs[1:], depth + 1)
        )
        return Named(name=name, value=value)
    if signs == ["="] and _NAME.fullmatch(sides[1].strip()):  # `5 = x`
        return _relation(sides[::-1], signs, depth)
    chain = Chain(sides=tuple(_read(side, depth + 1) for side in sides), signs=tuple(signs))
    return _as_interval(chain, [side.strip() for side in sides]) or chain


def _as_interval(chain: Chain, texts: list[str]) -> Answer | None:
    """`1 < x \\le 2` is the interval (1, 2], by name."""
    import sympy

    sides, signs = list(chain.sides), list(chain.signs)
    if any(sign not in _FLIPPED for sign in signs) or len(sides) > 3:
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
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
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
    opening = text[:2] if text.startswith(r"\{") else text[:1]
    if opening not in _PAIRS:
        return None
    closing = r"\}" if text.endswith(r"\}") else text[-1:]
    inner = text[len(opening) : len(text) - len(closing)]
    curly = {"{", r"\{", "}", r"\}"}
    if (opening in curly) != (closing in curly) or closing not in _PAIRS.values():
        return None
    if len(text) < 2 or not _balanced(inner):
        return None
    if not inner.strip():
        return _text(text)
    items = _split(inner, re.compile("[,;]"))[0]
    if len(items) == 1:  # brackets around one thing, `\{72\}` and `(72)` too, are no more than it
        return _read(inner, depth + 1) if closing == _PAIRS[opening] else None
    if len(items) > MAX_ITEMS or not all(item.strip() for item in items):
        return None
    opening, closing = opening.removeprefix("\\"), closing.removeprefix("\\")
    return Group(
        items=tuple(_read(item, depth + 1) for item in items), opening=opening, closing=closing
    )


def _quantity(text: str) -> Answer | None:
    """A number and its unit, sign of currency, percent or degrees."""
    if text.endswith("%"):
        value = _value(text[:-1].rstrip())
        return value and Value(exact=value.exact, written=value.written, percent=True)
    if degrees := _DEGREES.fullmatch(text):
        return _with_unit(degrees[1], "degree" + (degrees[2] or "")[:1].upper())
    if currency := _CURRENCY.fullmatch(text):
        rest = re.sub(r"\s+(?:dollars|USD|euros?|pounds?)$", "", currency[4])
        unit = unit_of(currency[2], spaced=True)
        return _with_unit(currency[1] + currency[3] + rest, unit) if unit else None
    short = len(text) <= MAX_QUANTITY_CHARS
    found = _QUANTITY.fullmatch(without_braces(text)) if short else None
    if found is None:
        return None
    name = unit_of(found["unit"].strip(), spaced=bool(found["space"]))
    return _with_unit(found["value"], name) if name else None


def _with_unit(text: str, unit: str) -> Value | None:
    value = _value(_GROUPED.sub(lambda number: number.group().replace(",", ""), text.strip()))
    if value is None or (not isinstance(value.exact, Fraction) and value.exact.free_symbols):
        return None
    if len(_split(text.strip().lstrip("+-"), re.compile("[-+]"))[0]) > 1:
        return None  # `1 + 2 m` is a sum, not three metres
    if unit == "percent":
        return Value(exact=value.exact, written=value.written, percent=True)
    return Value(exact=value.exact, written=value.written, unit=unit)


def _value(text: str) -> Value | None:
    if number := numbers.read(text):
        return Value(exact=number.value, written=number.written)
    if _HEAVY.search(text):
        return _with_operators(text)
    try:
        found = expression(text)
    except Unreadable:
        return None
    if found.is_Rational:
        return Value(exact=Fraction(int(found.p), int(found.q)), written=_digits(text))
    return Value(exact=found, written=_digits(text))


def _with_operators(text: str) -> Value | None:
    """Sums, products, integrals, limits: as latex2sympy reads them, evaluated by sympy."""
    from latex2sympy2_extended import latex2sympy
    from sympy import Expr

    try:
        found = latex2sympy(text, normalization_config=None).doit()
    except Exception:  # whatever its grammar, or sympy, raises on a model's text
        return None
    return Value(exact=found) if isinstance(found, Expr) else None


def _digits(text: str) -> Written | None:
    """The precision of the least exact decimal in an expression."""
    found = re.findall(r"[0-9]*\.[0-9]+", text)
    if not found:
        return None
    return Written(Fraction(0), min(len(one.replace(".", "").lstrip("0")) for one in found))


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
    return Text(words=re.sub(r" ?([-,;:]) ?", r"\1", words).casefold())


def _is_prose(text: str) -> bool:
    """A sentence with figures in it: `71. The answer is 72`."""
    return re.search(r"[0-9A-Za-z]\.\s+[A-Z]", text) is not None


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of `text` outside of brackets, and the separators between them."""
    parts, signs, depth, start, index, bar = [], [], 0, 0, 0, False
    while index < len(text):
        found = separator.match(text, index) if depth == 0 and not bar else None
        if found and found.end() > index:
            parts.append(text[start:index])
            signs.append(found.group().strip())
            start = index = found.end()
            continue
        token = _TOKEN.match(text, index)
        assert token is not None
        piece = token.group()
        if piece == "|":
            bar = not bar
        depth += (piece in ("(", "[", "{", r"\{")) - (piece in (")", "]", "}", r"\}"))
        index = token.end()
    parts.append(text[start:])
    return parts, signs


def _balanced(text: str) -> bool:
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if depth < 0:
            return False
    return depth == 0
