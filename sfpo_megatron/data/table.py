"""The prompts of a run, all token ids in one flat array; a `Prompt` is made when it is asked for.

With a tuple of Python's integers each, prompts of 170 tokens took 24 KB; here a token is 4 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

from sfpo_megatron.data.rows import Row, source_name
from sfpo_megatron.types import Prompt


class PromptTable(Sequence[Prompt]):
    """Rows, and their token ids one after the other."""

    def __init__(
        self,
        rows: Sequence[Row],
        token_ids: array[int],
        ends: array[int],
        text: Callable[[Row], str],
        too_long: Sequence[tuple[str, int]],
    ) -> None:
        """`ends`: 0, then where in `token_ids` each row's end; `text`: what the tokenizer got;
        `too_long`: id and tokens of the rows that did not fit."""
        self.rows = rows
        self._token_ids, self._ends, self._text = token_ids, ends, text
        self._too_long = too_long

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.rows[index]
        start, end = self._span(index)
        return Prompt(
            id=row.id,
            text=self._text(row),
            token_ids=tuple(self._token_ids[start:end]),
            question=row.question,
            answer=row.answer,
            metadata=row.metadata,
            reward=row.reward,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def renamed(self, name: Callable[[str], str]) -> PromptTable:
        """The same prompts with other ids."""
        rows = [replace(row, id=name(row.id)) for row in self.rows]
        too_long = [(name(row_id), length) for row_id, length in self._too_long]
        return PromptTable(rows, self._token_ids, self._ends, self._text, too_long)

    def lengths(self, source: str) -> list[int]:
        """Tokens of the prompts of a source, of those too that did not fit."""
        spans = ((row.source, place) for place, row in enumerate(self.rows))
        found = [self._ends[i + 1] - self._ends[i] for name, i in spans if name == source]
        return found + [n for row_id, n in self._too_long if source_name(row_id) == source]

    def _span(self, index: int) -> tuple[int, int]:
        place = range(len(self))[index]  # also -1, and IndexError past the end
        return self._ends[place], self._ends[place + 1]


class MadePrompts(tuple[Prompt, ...]):
    """Prompts that were made one by one, with the doors of a `PromptTable`."""

    __slots__ = ()

    @property
    def rows(self) -> Sequence[Prompt]:
        """What has the prompts' ids."""
        return self

    def renamed(self, name: Callable[[str], str]) -> MadePrompts:
        """The same prompts with other ids."""
        return MadePrompts(replace(prompt, id=name(prompt.id)) for prompt in self)
