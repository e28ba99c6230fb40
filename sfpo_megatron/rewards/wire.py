"""What passes between the run and a scoring process: lines of JSON, never pickle.

in   a Batch
out  {"ready": true} or {"failed": reason} once; then for each response of a batch a Verdict as
     soon as it is there, or for a batch that a function scored at once: {"verdicts": [...]}, or
     {"again": true} where the function raised and wants the responses one by one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypedDict


@dataclass(kw_only=True, frozen=True, slots=True)
class WireProblem:
    """`rewards.Problem` as it came over the pipe."""

    id: str
    question: str
    answer: str
    metadata: Mapping[str, Any]


_TUPLE, _ITEMS, _FRACTION = "\0tuple", "\0items", "\0fraction"


def packed(value: Any) -> Any:
    """Metadata for JSON, with what JSON would change or refuse marked: tuples, fractions, and keys
    that are no text. A verifier may compare with them (reasoning_gym's arc_agi, rearc)."""
    if isinstance(value, Fraction):
        return {_FRACTION: [value.numerator, value.denominator]}
    if isinstance(value, tuple):
        return {_TUPLE: [packed(item) for item in value]}
    if isinstance(value, list):
        return [packed(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: packed(item) for key, item in value.items()}
        return {_ITEMS: [[packed(key), packed(item)] for key, item in value.items()]}
    return value


def unpacked(line: bytes) -> Any:
    """The JSON of a line, with what `packed` has marked as it was."""
    return json.loads(line, object_hook=_marked)


def _marked(found: dict[str, Any]) -> Any:
    if len(found) == 1:
        if _TUPLE in found:
            return tuple(found[_TUPLE])
        if _ITEMS in found:
            return dict(found[_ITEMS])
        if _FRACTION in found:
            return Fraction(*found[_FRACTION])
    return found


class Batch(TypedDict):
    """Responses to score; a problem that several share is there once."""

    function: int
    """Which of those that the process has loaded."""
    problems: list[dict[str, Any]]
    items: list[tuple[int, str]]
    """(index of the problem, response)."""
    cpu_s: float
    """CPU seconds that the process may take for all of them, on each core that it may use."""
    explain: bool
    """Verdicts have `explained`."""


class Explanation(TypedDict):
    """How a built-in function read a response and the reference."""

    found: str | None
    """What it takes for the answer of the response."""
    read: list[str]
    """What it makes of that."""
    reference: str
    reference_read: list[str]


class Verdict(TypedDict, total=False):
    """One response's: `reward` and `parts`, or one of the others."""

    reward: float
    parts: dict[str, float]
    raised: str
    """The traceback of a function that raises on the reference answer too."""
    unjudged: str
    """What the machine could not do: CannotBeJudged."""
    refused: str
    """What the function returned, and what was expected: no score."""
    explained: Explanation


class Reply(Verdict, total=False):
    """A line from a scoring process."""

    ready: bool
    failed: str
    """Why the function cannot be loaded."""
    may_pass: bool
    """Whether another start could load it."""
    verdicts: list[Verdict]
    again: bool
