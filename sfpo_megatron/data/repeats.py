"""Rows that repeat: kept once and counted; equal questions with different answers are told.

A batch that holds a question three times gives it three times the weight. A generator's problems
(reasoning_gym) stay as they are drawn, and a source that is listed twice counts twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from sfpo_megatron.data.errors import shorten
from sfpo_megatron.data.rows import Row


class Repeats:
    """Every (question, system message, answer) so far."""

    def __init__(self) -> None:
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
        identity = row.identity
        asked = _digest(str(listing), row.system, identity)
        first = self._asked.setdefault(asked, row)
        if first is row:
            return True
        if row.answer == first.answer:
            self.repeated[row.source] += 1
            return False
        answered = _digest(str(listing), row.system, identity, row.answer)
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

    @property
    def said(self) -> list[str]:
        """What was found, if anything was."""
        found = []
        if num_repeated := self.repeated.total():
            rows = "row" if num_repeated == 1 else "rows"
            found.append(f"{num_repeated} {rows} repeated an earlier one and were left out")
        if self.num_differing:
            what = "row answers" if self.num_differing == 1 else "rows answer"
            found.append(
                f"{self.num_differing} {what} an earlier question differently (the first: "
                f"{self._first})"
            )
        return found


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
