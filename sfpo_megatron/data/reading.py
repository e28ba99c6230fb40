"""The rows of a run's sources: read, without those that are held out or repeat."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sfpo_megatron.config.source_files import name_of
from sfpo_megatron.config.tree import DataSource, RunConfig
from sfpo_megatron.data.counted import SourceRows
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.reasoning_gym import derived_seed
from sfpo_megatron.data.repeats import Repeats
from sfpo_megatron.data.rows import BadRows, Row
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.data.taught import lesson_of

EVAL = "eval."
"""Begins the names of data.eval's sources."""
GENERATED = "reasoning_gym"


class TrainRows:
    """The rows to train on, and what is to be said of all that were read."""

    def __init__(self, config: RunConfig, bad: BadRows, *, rewarded: bool = True) -> None:
        """`rewarded`: a row without a reference is a bad one, and a question has one answer; else
        it may have several worked solutions."""
        self.rows: list[Row] = []
        self.held_out: Counter[str] = Counter()
        """Source -> its rows that ask a question of data.eval."""
        self._bad, self._rewarded = bad, rewarded
        self._repeats = Repeats(_reference if rewarded else lesson_of)
        self._layouts: dict[str, str] = {}
        self._left_out: dict[str, int] = {}
        self._num_unanswered = 0
        held_out = {_question(row) for row in eval_rows(config, BadRows("skip"))}
        listings = _listings(config.data.train)
        for row, number in rows_of(config, "train", bad, rewarded=rewarded):
            source = config.data.train[number]
            if held_out and _question(row) in held_out:
                self.held_out[row.source] += 1
            elif source.source == GENERATED or self._repeats.keeps(row, listings[number]):
                self.rows.append(row)
                self._note(row)
        if self.held_out and not self.rows:
            bad.settle()
            raise DataError(
                "data.train",
                found=f"{self.held_out.total()} prompts, every one a question of data.eval too",
                expected="questions that are not held out",
                fix="train on other problems, or widen the task so that more of them exist",
            )

    def counted(self, name: str, kept: int) -> SourceRows:
        """What became of the rows of a source, of which so many are prompts."""
        return SourceRows(
            name=name,
            kept=kept,
            repeated=self._repeats.repeated[name],
            held_out=self.held_out[name],
            bad=self._bad.of(name),
        )

    def _note(self, row: Row) -> None:
        if row.layout:
            self._layouts.setdefault(row.source, row.layout)
        for name in row.left_out:
            self._left_out[name] = self._left_out.get(name, 0) + 1
        self._num_unanswered += not row.answer

    @property
    def said(self) -> list[str]:
        """What was found, if anything was."""
        found = [f"{source} has the columns of {of}" for source, of in self._layouts.items()]
        if self._left_out:
            names = ", ".join(self._left_out)
            found.append(f"columns that JSON cannot hold are no metadata: {names}")
        if self._num_unanswered:
            found.append(f"{self._num_unanswered} problems have no reference answer")
        found += self._repeats.said
        return found + self._repeats.said_differing if self._rewarded else found


def rows_of(
    config: RunConfig, split: Literal["train", "eval"], bad: BadRows, *, rewarded: bool = True
) -> Iterator[tuple[Row, int]]:
    """The good rows of data.train or data.eval, each with the number of its source."""
    sources = config.data.train if split == "train" else config.data.eval
    names = source_names(sources, prefix="" if split == "train" else EVAL)
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        key = f"data.{split}[{number}]"
        # eval: no run seed in it, see eval_prompts
        seed = derived_seed(split, number, *([config.seed] if split == "train" else []))
        found = source_rows(source, seed=seed, key=key, name=name)
        if rewarded:
            found = (getattr(row, "unrewarded", None) or row for row in found)
        for row in bad.good(found, name):
            yield row, number


def eval_rows(config: RunConfig, bad: BadRows) -> Iterator[Row]:
    """The problems of data.eval as they are, with or without a reference."""
    return (row for row, _ in rows_of(config, "eval", bad, rewarded=False))


def train_rows(config: RunConfig) -> list[Row]:
    """The problems of data.train as they are, for what has no tokenizer yet."""
    bad = BadRows(config.data.on_bad_row)
    rows = [row for row, _ in rows_of(config, "train", bad)]
    bad.settle()
    return rows


def source_names(sources: Sequence[DataSource], prefix: str = "") -> list[str]:
    """A name for each source, the first part of its prompts' ids; no two alike."""
    return _unique([_base(s.task, s.path, s.source) for s in sources], prefix)


def source_names_of(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names in a cursor, of a config as a checkpoint has it: a plain tree."""

    def bases(split: str) -> list[str]:
        sources = config["data"][split]
        return [_base(s.get("task"), s.get("path"), s["source"]) for s in sources]

    return {"names": _unique(bases("train"), ""), "eval_names": _unique(bases("eval"), EVAL)}


def _base(task: str | None, path: str | None, source: str) -> str:
    return task or (name_of(path) if path else "") or source


def _unique(bases: Sequence[str], prefix: str) -> list[str]:
    names: list[str] = []
    for base in (prefix + base for base in bases):
        names.append(base if base not in names else f"{base}#{len(names)}")
    return names


def _listings(sources: Sequence[DataSource]) -> list[int]:
    """How often each source was listed before."""
    same = [(s.source, s.path, s.config, s.split, s.args, s.columns) for s in sources]
    return [same[:number].count(source) for number, source in enumerate(same)]


def _reference(row: Row) -> str:
    return row.answer


def _question(row: Row) -> bytes:
    return hashlib.blake2b(row.identity.encode(errors="surrogatepass"), digest_size=16).digest()
