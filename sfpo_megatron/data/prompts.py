"""Prompts of a run: sources read, filtered, tokenized once; then dealt out behind a cursor.

The order is a function of (run seed, epoch) alone, so that the cursor is two integers and a
resumed run draws exactly the prompts that the ended one would have drawn. Where the data has
changed since and that was accepted, the epoch that is under way has an order of its own, which the
cursor holds until it ends.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.tree import DataSource, RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.reasoning_gym import derived_seed
from sfpo_megatron.data.remembered import DataChange, Remembered, compare
from sfpo_megatron.data.rows import BadRows, Row, same_question
from sfpo_megatron.data.selective import History, NoHistory
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.data.tokenize import tokenized_prompts
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Tokenize = Callable[
    [Iterable[Row], RunConfig, "PreTrainedTokenizerBase", BadRows], Iterator[Prompt]
]
"""`tokenized_prompts`, or what does the same for other rows."""

EVAL = "eval."
"""Begins the names of data.eval's sources."""


class PromptStream:
    """Training prompts without end: every epoch a new shuffle of all sources together.

    A batch never straddles two epochs (it could hold a prompt twice): the few prompts that are
    left when fewer than a batch remain are passed over, others in each epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokenize: Tokenize = tokenized_prompts,
        rewarded: bool = True,
    ) -> None:
        """`tokenize` makes prompts of rows. `rewarded`: a row without a reference is a bad one."""
        self._seed = config.seed
        bad = BadRows(config.data.on_bad_row)
        others = _rows(config, "eval", BadRows("skip"), rewarded=False)
        held_out = {same_question(row.question) for row in others}
        rows = list(_rows(config, "train", bad, rewarded=rewarded))
        kept = [row for row in rows if same_question(row.question) not in held_out]
        if rows and not kept:
            raise DataError(
                "data.train",
                found=f"{len(rows)} prompts, every one a question of data.eval too",
                expected="questions that are not held out",
                fix="train on other problems, or widen the task so that more of them exist",
            )
        self.prompts = tuple(tokenize(kept, config, tokenizer, bad))
        if not self.prompts:
            raise DataError(
                "data.train", found=f"no prompt ({bad})", expected="at least one", fix="add prompts"
            )
        self.summary = (
            f"{len(self.prompts)} training prompts, "
            f"{len(rows) - len(kept)} left out as questions of data.eval, {bad}"
        )
        self._names = source_names(config.data.train)
        self.eval_names = source_names(config.data.eval, prefix=EVAL)
        """Those of data.eval's sources, kept like those of data.train's (`difference`)."""
        self._accepted = ""
        self._epoch, self._position = 0, 0
        self._own_order: list[int] = []  # of this epoch, where it is not the shuffle
        self._order = self._shuffled(0)
        self._num_skipped = 0

    def next_batch(self, num_prompts: int, history: History | None = None) -> list[Prompt]:
        """The next `num_prompts` prompts, all different, of those that `history` keeps."""
        if num_prompts > len(self.prompts):
            raise DataError(
                "data.train",
                found=f"{len(self.prompts)} prompts",
                expected=f"at least one batch of {num_prompts} different ones",
                fix="add prompts, or lower train.prompts_per_step",
            )
        chosen = self._chosen(num_prompts, history or NoHistory())
        return [self.prompts[index] for index in chosen]

    def _chosen(self, num_prompts: int, history: History) -> list[int]:
        """Indices of the next batch. Fewer prompts than a batch at the end of an epoch are left out
        with it, as they are without a history."""
        begun_at = self._position
        while True:
            if self._position + num_prompts > len(self.prompts):
                self._epoch, self._position, begun_at = self._epoch + 1, 0, 0
                self._own_order = []
                self._order = self._shuffled(self._epoch)
            chosen: list[int] = []
            skipped: list[int] = []
            for index in self._order[self._position :]:
                draw = random.Random(derived_seed("skip", self._seed, self._epoch, index)).random()
                kept = history.keeps(self.prompts[index].id, draw)
                (chosen if kept else skipped).append(index)
                self._position += 1
                if len(chosen) == num_prompts:
                    break
            if begun_at == 0:  # if it was all of the epoch, some come that should be passed over
                missing = num_prompts - len(chosen)
                chosen, skipped = chosen + skipped[:missing], skipped[missing:]
            self._num_skipped += len(skipped)
            if len(chosen) == num_prompts:
                return chosen

    def state_dict(self) -> dict[str, Any]:
        """The cursor: plain numbers, and the prompts that it counts in as `Remembered`."""
        order = {"order": self._own_order} if self._own_order else {}
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "skipped": self._num_skipped,
            "names": list(self._names),
            "eval_names": list(self.eval_names),
            "rows": self._remembered.state,
            **order,
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
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order, self._own_order = self._shuffled(self._epoch), []
        if then is not None and difference:
            drawn = self._order_then(state, then)
            self._own_order = self._carried_over(drawn, compare(then, self._remembered))
        elif "order" in state:
            self._own_order = list(state["order"])
        self._order = self._own_order or self._order
        self._position = min(self._position, len(self.prompts))
        self._num_skipped = int(state.get("skipped", 0))  # versions before had none

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
        return self._epoch, self._position

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
            self.prompts = renamed(self.prompts, self._names, names)
            self._names = list(names)
        if len(eval_names) == len(self.eval_names):
            self.eval_names = list(eval_names)

    def _order_then(self, state: Mapping[str, Any], then: Remembered) -> list[int]:
        """Rows then, in the order in which their epoch was to draw them."""
        saved: list[int] = list(state.get("order", ()))
        return saved or self._shuffled(self._epoch, len(then.ids))

    def _carried_over(self, order: Sequence[int], change: DataChange) -> list[int]:
        """The epoch's order over the rows of now; moves the position along with those drawn."""
        place = change.place
        drawn = [place[row] for row in order[: self._position] if row in place]
        rest = [place[row] for row in order[self._position :] if row in place]
        added = list(change.added)
        random.Random(derived_seed("added", self._seed, self._epoch)).shuffle(added)
        self._position = len(drawn)
        return [*drawn, *rest, *added]

    def _shuffled(self, epoch: int, count: int | None = None) -> list[int]:
        order = list(range(len(self.prompts) if count is None else count))
        random.Random(derived_seed("order", self._seed, epoch)).shuffle(order)
        return order


def eval_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The held-out prompts, the same for every run seed so that runs can be compared."""
    bad = BadRows(config.data.on_bad_row)
    prompts = list(tokenized_prompts(_rows(config, "eval", bad), config, tokenizer, bad))
    if config.data.eval and not prompts:
        raise DataError(
            "data.eval", found=f"no prompt ({bad})", expected="at least one", fix="add prompts"
        )
    return prompts


def source_of(prompt_id: str) -> str:
    """Name of the source of a held-out prompt: ids are `eval.SOURCE/NUMBER`."""
    return prompt_id.rpartition("/")[0].removeprefix("eval.")


def train_rows(config: RunConfig) -> list[Row]:
    """The problems of data.train as they are, for what has no tokenizer yet."""
    return list(_rows(config, "train", BadRows(config.data.on_bad_row)))


def eval_rows(config: RunConfig, bad: BadRows) -> Iterator[Row]:
    """The problems of data.eval as they are, with or without a reference."""
    return _rows(config, "eval", bad, rewarded=False)


def _rows(config: RunConfig, split: str, bad: BadRows, *, rewarded: bool = True) -> Iterator[Row]:
    sources = config.data.train if split == "train" else config.data.eval
    names = source_names(sources, prefix="" if split == "train" else EVAL)
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        key = f"data.{split}[{number}]"
        # eval: no run seed in it, see eval_prompts
        seed = derived_seed(split, number, *([config.seed] if split == "train" else []))
        found = source_rows(source, seed=seed, key=key, name=name)
        if rewarded:
            found = (getattr(row, "unrewarded", None) or row for row in found)
        yield from bad.good(found)


def source_names(sources: Sequence[DataSource], prefix: str = "") -> list[str]:
    """A name for each source, the first part of its prompts' ids; no two alike."""
    return _unique([(s.task or Path(s.path or "").stem or s.source) for s in sources], prefix)


def source_names_of(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names in a cursor, of a config as a checkpoint has it: a plain tree."""

    def bases(split: str) -> list[str]:
        sources = config["data"][split]
        return [s.get("task") or Path(s.get("path") or "").stem or s["source"] for s in sources]

    return {"names": _unique(bases("train"), ""), "eval_names": _unique(bases("eval"), EVAL)}


def _unique(bases: Sequence[str], prefix: str) -> list[str]:
    names: list[str] = []
    for base in (prefix + base for base in bases):
        names.append(base if base not in names else f"{base}#{len(names)}")
    return names


def renamed(
    prompts: Sequence[Prompt], now: Sequence[str], then: Sequence[str]
) -> tuple[Prompt, ...]:
    """The same prompts, with the names that their sources had then."""
    new = {name: then[place] for place, name in enumerate(now)}
    parts = ((prompt, prompt.id.partition("/")) for prompt in prompts)
    return tuple(replace(prompt, id=f"{new[name]}/{row}") for prompt, (name, _, row) in parts)


def print_of(state: Mapping[str, Any]) -> str:
    """The fingerprint of the prompts that a saved cursor counts in."""
    return str(state["rows"]["fingerprint"] if "rows" in state else state["fingerprint"])


def fingerprint_of_before(prompts: Sequence[Prompt]) -> str:
    """What a checkpoint of the format before has of its prompts: ids and token ids, hashed."""
    digest = hashlib.sha256(repr([(p.id, p.token_ids) for p in prompts]).encode())
    return digest.hexdigest()[:16]
