"""A row: one problem of a source, before the tokenizer saw it; and what is done about a bad one.

A source reports a bad row, as a `DataError` among its rows, instead of raising: one place
(`BadRows`) holds `data.on_bad_row`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sfpo_megatron.config.reward import RewardChoice
from sfpo_megatron.data.errors import BadRowsError, DataError, by_kind

MOST_SHOWN = 20
"""Bad rows that a report names."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Row:
    """One problem as its source states it."""

    id: str
    """`<source>/<index>`; a source itself gives the index alone."""
    where: str
    """How a message names it: `FILE:LINE`, or the config key and the entry's number."""
    question: str
    answer: str
    """The reference; empty where a task has none, and its verifier needs none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    """The system message; empty for data.system_prompt."""
    history: tuple[tuple[str, str], ...] = ()
    """(role, content) of a conversation's turns before the question."""
    layout: str = ""
    """Name of the trainer whose columns it came in; empty for ours."""
    left_out: tuple[str, ...] = ()
    """Columns that JSON cannot hold: they are no metadata."""
    lacks: tuple[str, ...] = ()
    """`system` and `metadata`, where the source's columns name them and the record has no such
    column."""
    unrewarded: DataError | None = None
    """Why no response can be rewarded: the row has no reference, and is for `sft` alone."""
    reward: RewardChoice | None = None
    """Reward of its source; None: reward.function."""

    def within(self, source: str, reward: RewardChoice | None) -> Row:
        """The same row, with the name of its source in its id, and the source's reward."""
        return replace(self, id=f"{source}/{self.id}", reward=reward)

    @property
    def source(self) -> str:
        """Name of its source."""
        return source_name(self.id)

    @property
    def identity(self) -> str:
        """The same for two rows that ask the same, whatever the white space."""
        if not self.history:
            return same_question(self.question)
        turns = (same_question(content) for _, content in self.history)
        return "\n".join((*turns, same_question(self.question)))


def source_name(row_id: str) -> str:
    """Name of the source of a row, or of its prompt: ids are `<source>/<index>`."""
    return row_id.partition("/")[0]


def same_question(question: str) -> str:
    """What makes two questions the same one: their text, whatever the white space."""
    # No white space but single spaces within: a third of the time that taking it apart needs.
    if question.isprintable() and "  " not in question and question == question.strip(" "):
        return question
    return " ".join(question.split())


class BadRows:
    """Counts bad rows by source and kind, and keeps the first, for one report of all of them."""

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self._policy = policy
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._shown: list[DataError] = []

    @property
    def num_skipped(self) -> int:
        """How many rows were bad."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """What is wrong with them -> how many."""
        return dict(sum(self._counts.values(), Counter[str]()))

    def of(self, source: str) -> dict[str, int]:
        """What is wrong with the rows of a source -> how many."""
        return dict(self._counts[source]) if source in self._counts else {}

    @property
    def first(self) -> DataError | None:
        """The first of them."""
        return self._shown[0] if self._shown else None

    def report(self, error: DataError, source: str) -> None:
        """Count a bad row of a source."""
        self._counts[source][error.kind] += 1
        if len(self._shown) < MOST_SHOWN:
            self._shown.append(error)

    def good(self, rows: Iterable[Row | DataError], source: str) -> Iterator[Row]:
        """The rows of a source that are fine."""
        for row in rows:
            if isinstance(row, DataError):
                self.report(row, source)
            else:
                yield row

    def settle(self) -> None:
        """With `data.on_bad_row: error`, raise a report of all of them, if there are any."""
        if self._policy == "error" and self._shown:
            raise (
                self._shown[0] if self.num_skipped == 1 else BadRowsError(self._shown, self.counts)
            )

    def __str__(self) -> str:
        if not self._shown:
            return "no row skipped"
        kinds = f"; {by_kind(self.counts)}"
        return f"{self.num_skipped} bad rows skipped (the first: {self.first}{kinds})"
