"""A row: one problem of a source, before the tokenizer saw it; and what is done about a bad one.

A source reports a bad row, as a `DataError` among its rows, instead of raising: one place
(`BadRows`) holds `data.on_bad_row`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sfpo_megatron.config.reward import RewardChoice
from sfpo_megatron.data.errors import DataError


@dataclass(kw_only=True, frozen=True, slots=True)
class Row:
    """One problem as its source states it."""

    id: str
    """`<source>/<index>`; a source itself gives the index alone."""
    where: str
    """How a message names it: `FILE:LINE`, or the config key and the entry's number."""
    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unrewarded: DataError | None = None
    """Why no response can be rewarded: the row has no reference, and is for `sft` alone."""
    reward: RewardChoice | None = None
    """That of its source; None: reward.function."""


def same_question(question: str) -> str:
    """What makes two questions the same one: their text, whatever the white space."""
    return " ".join(question.split())


class BadRows:
    """Ends the run at the first bad row, or counts it and keeps the first as an example."""

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self._policy = policy
        self.num_skipped = 0
        self.first: DataError | None = None

    def report(self, error: DataError) -> None:
        """Raise `error`, or count it, as `data.on_bad_row` says."""
        if self._policy == "error":
            raise error
        self.num_skipped += 1
        self.first = self.first or error

    def good(self, rows: Iterable[Row | DataError]) -> Iterator[Row]:
        """The rows that are fine."""
        for row in rows:
            if isinstance(row, DataError):
                self.report(row)
            else:
                yield row

    def __str__(self) -> str:
        if not self.num_skipped:
            return "no row skipped"
        return f"{self.num_skipped} bad rows skipped (the first: {self.first})"
