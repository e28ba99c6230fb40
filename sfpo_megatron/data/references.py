"""Whether the reward can read a row's reference: known before a run, not when a step draws it.

A built-in reward says so by a function of its module: `readable(answer)`, or `scorable(problem)`
where more than the answer decides; both give the reason, or None.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.plugins import REWARD

_CACHED = 1 << 16
NEED_NONE = frozenset({"reasoning_gym", "format"})
"""Built-in rewards that can judge a response without a reference."""


class References:
    """The references of rows, as one reward reads them."""

    def __init__(self, function: str) -> None:
        """`function`: reward.function. What a user's own reads, it alone knows."""
        self._function = function
        self._own = function not in REWARD.built_in
        self._scorable: Callable[[Row], str | None] | None = None
        self._readable: Callable[[str], str | None] | None = None
        if not self._own:
            module = importlib.import_module(REWARD.built_in[function].partition(":")[0])
            self._scorable = getattr(module, "scorable", None)
            if readable := getattr(module, "readable", None):
                self._readable = functools.lru_cache(_CACHED)(readable)

    def fault(self, row: Row) -> DataError | None:
        """What is wrong with the row's reference; None if the reward can use it."""
        if not row.answer and not self._own and self._function not in NEED_NONE:
            return DataError(
                row.where,
                found="a problem without a reference answer",
                expected=f"one, which reward {self._function} compares with",
                fix="set reward.function=reasoning_gym, or leave the task out",
                kind="without a reference",
            )
        if self._scorable is not None:
            why = self._scorable(row)
        else:
            why = self._readable(row.answer) if self._readable is not None else None
        if why is None:
            return None
        return DataError(
            row.where,
            found=f"a reference that reward {self._function} cannot read: {shorten(row.answer)}"
            + (f" ({shorten_line(why)})" if why else ""),
            expected=f"an answer as {self._function} compares it",
            fix="correct the row, or choose another reward.function",
            kind=f"with a reference that {self._function} cannot read",
        )


def shorten_line(text: str, limit: int = 120) -> str:
    """The first line of a text, cut."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
