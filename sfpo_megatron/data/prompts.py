"""Prompts of a run: sources read, filtered, tokenized once; then dealt out behind a cursor.

The order is a function of (run seed, epoch) alone, so that the cursor is two integers and a
resumed run draws exactly the prompts that the ended one would have drawn. Where the data has
changed since and that was accepted, the epoch that is under way has an order of its own, which the
cursor holds until it ends.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.cursor import Cursor
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.reading import EVAL, TrainRows, rows_of, source_names
from sfpo_megatron.data.remembered import Remembered, compare
from sfpo_megatron.data.rendering import Renderer
from sfpo_megatron.data.rows import BadRows, Row, source_name
from sfpo_megatron.data.selective import History, NoHistory
from sfpo_megatron.data.table import MadePrompts, PromptTable
from sfpo_megatron.data.tokenize import Tokens, tokenized_prompts
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Tokenize = Callable[
    [Sequence[Row], RunConfig, Tokens, Renderer, BadRows], PromptTable | MadePrompts
]
"""`tokenized_prompts`, or what does the same for other rows."""


class PromptStream:
    """Training prompts without end: every epoch a new shuffle of all sources together."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        now: str | None = None,
        bad: BadRows | None = None,
        tokenize: Tokenize = tokenized_prompts,
        rewarded: bool = True,
    ) -> None:
        """`now`: `date_of` the run's checkpoint; `bad`: where bad rows are reported, if whoever
        made it settles with it; else they are an error here, or skipped and counted. `tokenize`
        makes prompts of rows; `rewarded`: a row without a reference is a bad one."""
        self._seed = config.seed
        found = BadRows(config.data.on_bad_row) if bad is None else bad
        read = TrainRows(config, found, rewarded=rewarded)
        self._renderer = Renderer(config, tokenizer, now)
        tokens = Tokens(config, tokenizer)
        self.prompts = tokenize(read.rows, config, tokens, self._renderer, found)
        if bad is None or not self.prompts:
            found.settle()
        if not self.prompts:
            said = f"no prompt ({found})"
            raise DataError("data.train", found=said, expected="at least one", fix="add prompts")
        self._names = source_names(config.data.train)
        self.eval_names = source_names(config.data.eval, prefix=EVAL)
        """Those of data.eval's sources, kept like those of data.train's (`difference`)."""
        counts = _counts((row.id for row in self.prompts.rows), self._names)
        self.sources = tuple(map(read.counted, self._names, counts))
        """What became of the rows of each source."""
        weights = [source.weight for source in config.data.train]
        self._cursor = Cursor(config.seed, counts, weights)
        dated = f"the chat template prints the date: {self.now}, in every resume too"
        self.summary = "; ".join(
            (
                f"{len(self.prompts)} training prompts, "
                f"{read.held_out.total()} left out as questions of data.eval, {found}",
                *read.said,
                *tokens.said,
                *([dated] if self.now else []),
            )
        )
        self._accepted = ""

    @property
    def now(self) -> str | None:
        """The time that the chat template has printed; None if it prints none."""
        return self._renderer.now

    @property
    def epoch_size(self) -> int:
        """Prompts that an epoch draws: with unequal weights not all."""
        return self._cursor.length

    def hold_batch(self, num_prompts: int) -> None:
        """Raise DataError if an epoch has no batch of `num_prompts` different prompts."""
        size = self.epoch_size
        if num_prompts > size:
            of = f" ({size} an epoch, by data.train's weights)"
            raise DataError(
                "data.train",
                found=f"{len(self.prompts)} prompts" + (of if size < len(self.prompts) else ""),
                expected=f"at least one batch of {num_prompts} different ones",
                fix="add prompts, or lower train.prompts_per_step",
            )

    def next_batch(self, num_prompts: int, history: History | None = None) -> list[Prompt]:
        """The next `num_prompts` prompts, all different, of those that `history` keeps."""
        self.hold_batch(num_prompts)
        known = history or NoHistory()

        def keeps(index: int, draw: float) -> bool:
            return known.keeps(self.prompts.rows[index].id, draw)

        return [self.prompts[index] for index in self._cursor.next_batch(num_prompts, keeps)]

    def state_dict(self) -> dict[str, Any]:
        """The cursor: plain numbers, and the prompts that it counts in as `Remembered`."""
        return {
            **self._cursor.state_dict(),
            "names": list(self._names),
            "eval_names": list(self.eval_names),
            "rows": self._remembered.state,
            **({"now": self.now} if self.now else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved cursor, if it counts in these prompts, or if their difference has
        been accepted: then gone rows are passed over, and new ones come last in this epoch."""
        then, difference = self._compared(state)
        if difference and self._accepted != print_of(state):
            raise DataError(
                "data cursor",
                found=difference,
                expected="the data of the run that was saved",
                fix="undo the change, or go on with it by --accept-data-change",
            )
        if then is None or not difference:
            self._cursor.load_state_dict(state)
            return
        counts = _counts(then.ids, [str(place) for place in range(then.num_sources)])
        change = compare(then, self._remembered)
        self._cursor.carry_over(state, counts, change.place, change.added)

    def difference(self, state: Mapping[str, Any]) -> str:
        """How these prompts differ from those that a saved cursor counts in; empty if not at all.

        Ids keep the names that the sources had then: sampling seeds are made of them, and a file
        that was renamed is the same data. DataError for another seed.
        """
        return self._compared(state)[1]

    def accept(self, state: Mapping[str, Any]) -> None:
        """Let `load_state_dict` continue at this cursor although the data has changed."""
        self._accepted = print_of(state)

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, from 0, and how many prompts of it have been drawn."""
        return self._cursor.place

    @property
    def has_changed(self) -> bool:
        """Whether the run has continued on data that has changed (`accept`)."""
        return bool(self._accepted)

    @property
    def fingerprint(self) -> str:
        """One value for these prompts."""
        return self._remembered.fingerprint

    @cached_property
    def _remembered(self) -> Remembered:
        return Remembered.of(self.prompts, self._names)

    def _compared(self, state: Mapping[str, Any]) -> tuple[Remembered | None, str]:
        """The prompts that a cursor counts in, None where it cannot tell; what has changed."""
        if state["seed"] != self._seed:
            raise DataError(
                "data cursor",
                found=f"seed {state['seed']!r}",
                expected=f"{self._seed!r}, that of this run's data",
                fix="resume with the data, tokenizer and seed of the run that was saved",
            )
        self._keep_names(state)
        if "rows" not in state:
            same = state["fingerprint"] == fingerprint_of_before(self.prompts)
            return None, "" if same else (
                "other prompts (that checkpoint, of the format before, cannot say which)"
            )
        if state["rows"]["fingerprint"] == self.fingerprint:
            return self._remembered, ""
        then = Remembered.from_state(state["rows"])
        return then, compare(then, self._remembered).describe(then, self.prompts)

    def _keep_names(self, state: Mapping[str, Any]) -> None:
        names, eval_names = state.get("names", ()), state.get("eval_names", ())
        if len(names) == len(self._names) and list(names) != self._names:
            self.prompts = self.prompts.renamed(renaming(self._names, names))
            self._names = list(names)
        if len(eval_names) == len(self.eval_names):
            self.eval_names = list(eval_names)


def eval_prompts(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    now: str | None = None,
    bad: BadRows | None = None,
    renderer: Renderer | None = None,
) -> PromptTable:
    """The held-out prompts, the same for every run seed so that runs can be compared; rows that
    repeat are asked again, as their file says. `now` and `bad` as for `PromptStream`; `renderer`:
    one that prints a date already, in place of `now`."""
    found = BadRows(config.data.on_bad_row) if bad is None else bad
    rows = [row for row, _ in rows_of(config, "eval", found)]
    renderer = renderer or Renderer(config, tokenizer, now)
    tokens = Tokens(config, tokenizer)
    prompts = tokenized_prompts(rows, config, tokens, renderer, found)
    if bad is None:
        found.settle()
    if config.data.eval and not prompts:
        found.settle()
        said = f"no prompt ({found})"
        raise DataError("data.eval", found=said, expected="at least one", fix="add prompts")
    return prompts


def date_of(state: Mapping[str, Any]) -> str | None:
    """The time that the prompts of a saved cursor print; None if they print none."""
    return state.get("now")


def source_of(prompt_id: str) -> str:
    """Name of the source of a held-out prompt: ids are `eval.SOURCE/ROW`."""
    return source_name(prompt_id).removeprefix(EVAL)


def renaming(now: Sequence[str], then: Sequence[str]) -> Callable[[str], str]:
    """What gives an id the name that its source had then."""
    new = {name: then[place] for place, name in enumerate(now)}

    def name(prompt_id: str) -> str:
        source, _, row = prompt_id.partition("/")
        return f"{new[source]}/{row}"

    return name


def _counts(ids: Iterable[str], names: Sequence[str]) -> list[int]:
    """Prompts of each source."""
    found = Counter(map(source_name, ids))
    return [found[name] for name in names]


def print_of(state: Mapping[str, Any]) -> str:
    """The fingerprint of the prompts that a saved cursor counts in."""
    return str(state["rows"]["fingerprint"] if "rows" in state else state["fingerprint"])


def fingerprint_of_before(prompts: Sequence[Prompt]) -> str:
    """What a checkpoint of the format before has of its prompts: ids and token ids, hashed."""
    digest = hashlib.sha256(repr([(p.id, p.token_ids) for p in prompts]).encode())
    return digest.hexdigest()[:16]
