"""Rows that repeat: kept once and counted; equal questions with different answers are told.

A batch that holds a question three times gives it three times the weight. A generator's problems
(reasoning_gym) stay as they are drawn, and a source that is listed twice counts twice. For a warm
start a row repeats what teaches the same; other worked solutions of a question are no difference.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

from sfpo_megatron.data.errors import shorten
from sfpo_megatron.data.rows import Row


class Repeats:
    """Every (question, system message, answer) so far."""

    def __init__(self, answer: Callable[[Row], str]) -> None:
        """`answer`: what two rows that ask the same may differ in."""
        self._answer = answer
        self._verbatim: dict[str, tuple[Row, int]] = {}
        """Question -> the first row with it, and its listing: most repeats are letter by letter."""
        self._asked: dict[bytes, Row] = {}
        """Question and system message -> the first row that has them."""
        self._answered: set[bytes] = set()
        """Question, system message and answer of rows that answer such a question otherwise."""
        self.repeated: Counter[str] = Counter()
        """Source -> its rows that repeat an earlier one."""
        self.num_differing = 0
        self._first = ""

    def keeps(self, row: Row, listing: int) -> bool:
        """Whether the row is new. `listing`: how often its source was listed before."""
        verbatim = self._verbatim.setdefault(row.question, (row, listing))
        if verbatim[0] is not row and self._same(verbatim, row, listing):
            self.repeated[row.source] += 1
            return False
        identity = row.identity
        asked = _digest(str(listing), row.system, identity)
        first = self._asked.setdefault(asked, row)
        if first is row:
            return True
        answer = self._answer(row)
        if answer == self._answer(first):
            self.repeated[row.source] += 1
            return False
        answered = _digest(str(listing), row.system, identity, answer)
        if answered in self._answered:
            self.repeated[row.source] += 1
            return False
        self._answered.add(answered)
        self.num_differing += 1
        self._first = self._first or (
            f"{shorten(row.question, 60)} is {shorten(first.answer, 30)} in {first.where} and "
            f"{shorten(row.answer, 30)} in {row.where}"
        )
        return True

    def _same(self, verbatim: tuple[Row, int], row: Row, listing: int) -> bool:
        first, listed = verbatim
        return (
            listed == listing
            and first.system == row.system
            and first.history == row.history
            and self._answer(first) == self._answer(row)
        )

    @property
    def said(self) -> list[str]:
        """How many were left out, if any were."""
        if not (num_repeated := self.repeated.total()):
            return []
        rows = "row" if num_repeated == 1 else "rows"
        return [f"{num_repeated} {rows} repeated an earlier one and were left out"]

    @property
    def said_differing(self) -> list[str]:
        """How many answer a question otherwise, if any do."""
        if not self.num_differing:
            return []
        what = "row answers" if self.num_differing == 1 else "rows answer"
        return [
            f"{self.num_differing} {what} an earlier question differently (the first: "
            f"{self._first})"
        ]


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
