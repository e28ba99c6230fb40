"""Prompts of a run: sources read, filtered, tokenized once; then dealt out behind a cursor.

The order is a function of (run seed, epoch) alone, so that the cursor is two integers and a
resumed run draws exactly the prompts that the ended one would have drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.tree import DataSource, RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.reasoning_gym import derived_seed
from sfpo_megatron.data.rows import BadRows, Row, same_question
from sfpo_megatron.data.selective import History, NoHistory
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.data.tokenize import tokenized_prompts
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptStream:
    """Training prompts without end: every epoch a new shuffle of all sources together.

    A batch never straddles two epochs (it could hold a prompt twice): the few prompts that are
    left when fewer than a batch remain are passed over, others in each epoch.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._seed = config.seed
        bad = BadRows(config.data.on_bad_row)
        held_out = {same_question(row.question) for row in _rows(config, "eval", BadRows("skip"))}
        rows = list(_rows(config, "train", bad))
        kept = [row for row in rows if same_question(row.question) not in held_out]
        if rows and not kept:
            raise DataError(
                "data.train",
                found=f"{len(rows)} prompts, every one a question of data.eval too",
                expected="questions that are not held out",
                fix="train on other problems, or widen the task so that more of them exist",
            )
        self.prompts = tuple(tokenized_prompts(kept, config, tokenizer, bad))
        if not self.prompts:
            raise DataError(
                "data.train", found=f"no prompt ({bad})", expected="at least one", fix="add prompts"
            )
        self.summary = (
            f"{len(self.prompts)} training prompts, "
            f"{len(rows) - len(kept)} left out as questions of data.eval, {bad}"
        )
        digest = hashlib.sha256(repr([(p.id, p.token_ids) for p in self.prompts]).encode())
        self._fingerprint = digest.hexdigest()[:16]
        self._epoch, self._position = 0, 0
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

    def state_dict(self) -> dict[str, int | str]:
        """The cursor: plain numbers and the fingerprint of the prompts that it counts in."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "skipped": self._num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved cursor, if it counts in these prompts, in this order."""
        for name, mine in (("fingerprint", self._fingerprint), ("seed", self._seed)):
            if state[name] != mine:
                raise DataError(
                    "data cursor",
                    found=f"{name} {state[name]!r}",
                    expected=f"{mine!r}, that of this run's data",
                    fix="resume with the data, tokenizer and seed of the run that was saved",
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled(self._epoch)
        self._num_skipped = int(state.get("skipped", 0))  # versions before had none

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
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


def _rows(config: RunConfig, split: str, bad: BadRows) -> Iterator[Row]:
    sources = config.data.train if split == "train" else config.data.eval
    names = _names(sources, prefix="" if split == "train" else "eval.")
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        key = f"data.{split}[{number}]"
        # eval: no run seed in it, see eval_prompts
        seed = derived_seed(split, number, *([config.seed] if split == "train" else []))
        yield from bad.good(source_rows(source, seed=seed, key=key, name=name))


def _names(sources: tuple[DataSource, ...], prefix: str) -> list[str]:
    """A name for each source, the first part of its prompts' ids; no two alike."""
    names: list[str] = []
    for source in sources:
        base = prefix + (source.task or Path(source.path or "").stem or source.source)
        names.append(base if base not in names else f"{base}#{len(names)}")
    return names
