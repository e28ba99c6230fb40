"""Whether there are prompts enough for a batch, by a count that reads no row. No torch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sfpo_megatron.config.rules.parquet_footer import num_rows
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.source_files import (
    BOM,
    ENDINGS,
    LINES,
    NO_LINES_FIX,
    NoLines,
    files_of,
    is_blank,
    lines_in,
)
from sfpo_megatron.config.tree import DataSource, RunConfig

MANY = 10**12
"""More rows than a file has: `at_most` then counts them all."""


def rows(config: RunConfig) -> Iterator[Problem]:
    """Every source has rows, and those of data.train make one batch of different prompts."""
    train, needed = config.train, config.drawn_per_step
    total: int | None = 0
    for part, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for index, source in enumerate(sources):
            try:
                found = _counted(source, needed)
            except NoLines as error:
                yield Problem(
                    f"data.{part}.{index}.path",
                    str(error),
                    LINES,
                    NO_LINES_FIX,
                    "error_when_training",
                )
                found = None
            if found == 0:
                yield Problem(
                    f"data.{part}.{index}.path",
                    f"no row in {source.path!r}",
                    "one or more",
                    "add rows, or remove the source",
                    "error_when_training",
                )
            if part == "train":
                total = None if total is None or found is None else total + found
    if total is not None and 0 < total < needed and config.debug.train_only is None:
        oversample = config.rollout.oversample
        yield Problem(
            "train.prompts_per_step",
            f"{train.prompts_per_step}"
            + (f" x rollout.oversample {oversample:g}" if oversample != 1 else "")
            + f" with {total} prompts in data.train",
            f"at least one batch of {needed} different prompts",
            f"lower it to {math.floor(total / oversample)} or less, or add prompts",
            "error_when_filling",
        )


def at_most(source: DataSource, enough: int) -> int | None:
    """Rows of a source, counted as far as `enough`; None where only reading it can tell."""
    try:
        return _counted(source, enough)
    except NoLines:
        return None


def _counted(source: DataSource, enough: int) -> int | None:
    """The same; NoLines for a file that has no rows at all."""
    if source.source == "reasoning_gym":
        return source.size
    if source.source not in ENDINGS:
        return None
    count = 0
    files = files_of(source.source, source.path or "")
    for path in files:
        try:
            found = num_rows(path) if source.source == "parquet" else _lines(path, enough)
        except (OSError, EOFError, zlib.error):
            return None
        except NoLines as error:
            raise NoLines(f"{str(path)!r}, {error}") from error
        if found is None:
            return None
        count += found
        if count >= enough:
            break
    if not files:
        return None
    return count if source.size is None else min(count, source.size)


def _lines(path: Path, enough: int) -> int | None:
    """Lines of a file, None where the first is no object: the source says what it is."""
    with path.open("rb") as file:
        filled = (line for line in lines_in(file) if not is_blank(line))
        first = next(filled, None)
        if first is None:
            return 0
        if not first.removeprefix(BOM).lstrip().startswith(b"{"):
            return None
        return 1 + sum(1 for _ in islice(filled, enough - 1))
