"""What an answer is: a number, an expression, a list, an interval, a relation, a choice, a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from sfpo_megatron.rewards.quantities import Value


@dataclass(kw_only=True, frozen=True, slots=True)
class Text:
    """Words, or what could not be read; space does not count, nor case where it is prose.
    `is_set`: in \\text{}, so that its letters are no factors."""

    words: str
    cased: str = field(compare=False)
    is_set: bool = field(default=False, compare=False)


@dataclass(kw_only=True, frozen=True, slots=True)
class Group:
    """A list without brackets (both ""), a set, a tuple, an interval, a ratio (":"), a union
    (`opening` "u"), a difference of sets ("-")."""

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
    """`x = 5`, `x \\in A`: a name and what it is."""

    name: str
    value: Answer
    sign: str = "="


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
