"""What became of the rows of a source: each was kept, or left out for one reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True, slots=True)
class SourceRows:
    """Rows of one source, counted."""

    name: str
    """The first part of their ids."""
    kept: int
    """Rows that became prompts."""
    bad: Mapping[str, int]
    """What is wrong with a row -> how many."""
    repeated: int = 0
    """Rows of data.train that repeat an earlier one."""
    held_out: int = 0
    """Rows of data.train that ask a question of data.eval."""

    @property
    def num_bad(self) -> int:
        """How many rows were bad, whatever was wrong."""
        return sum(self.bad.values())

    @property
    def rows(self) -> int:
        """All rows of the source that were read."""
        return self.kept + self.repeated + self.held_out + self.num_bad
