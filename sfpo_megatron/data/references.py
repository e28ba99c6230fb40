"""Whether the reward can read a row's reference: known before a run, not when a step draws it.

A built-in reward says so by a function of its module: `readable(answer)`, or `scorable(problem)`
where more than the answer decides; both give the reason, or None.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.errors import shortened
from sfpo_megatron.plugins import REWARD

_CACHED = 1 << 16
NEED_NONE = frozenset({"reasoning_gym", "format", "http"})
"""Built-in rewards that can judge a response without a reference."""


class References:
    """The references of rows, as their rewards read them. A user's own reward alone knows its."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._reasons: dict[str, Callable[[Row], str | None]] = {}

    def fault(self, row: Row) -> DataError | None:
        """What is wrong with the row's reference; None if its rewards can use it."""
        for function in self._config.summands(row.reward):
            if function.name in REWARD.built_in:
                error = self._fault(row, function.name)
                if error is not None:
                    return error
        return None

    def read(self, row: Row) -> dict[str, list[str]]:
        """Each built-in reward of the row -> how it reads the reference; as it is where it compares
        text. Without the rewards that judge by no reference, and without your own."""
        names = (function.name for function in self._config.summands(row.reward))
        return {
            name: explained["reference_read"] or [explained["reference"]]
            for name in names
            if name in REWARD.built_in and (name not in NEED_NONE or row.answer)
            for explained in [_module(name).explain("", row)]
        }

    def _fault(self, row: Row, function: str) -> DataError | None:
        if not row.answer:
            if function in NEED_NONE:
                return None
            return DataError(
                row.where,
                found="a problem without a reference answer",
                expected=f"one, which reward {function} compares with",
                fix="score it by the reward reasoning_gym, or leave the task out",
                kind="without a reference",
            )
        if function not in self._reasons:
            self._reasons[function] = _reason(function)
        why = self._reasons[function](row)
        if why is None:
            return None
        return DataError(
            row.where,
            found=f"a reference that reward {function} cannot read: {shorten(row.answer)} "
            f"({shorten_line(why)})",
            expected=f"an answer as {function} compares it",
            fix="correct the row, or choose another reward",
            kind=f"with a reference that {function} cannot read",
        )


def _reason(function: str) -> Callable[[Row], str | None]:
    """Why a built-in reward cannot use a row, None if it can."""
    module = _module(function)
    scorable: Callable[[Row], str | None] | None = getattr(module, "scorable", None)
    if scorable is not None:
        return scorable
    readable: Callable[[str], str | None] = getattr(module, "readable", lambda _: None)
    cached = functools.lru_cache(_CACHED)(readable)
    return lambda row: cached(row.answer)


def _module(function: str) -> ModuleType:
    """The module of a built-in reward."""
    return importlib.import_module(REWARD.built_in[function].partition(":")[0])


def shorten_line(text: str) -> str:
    """The first line of a text, cut."""
    return shortened(text.strip().partition("\n")[0], 120)
