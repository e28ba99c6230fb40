"""The examples of a warm start: what data.train teaches, in the order of the run's seed.

One turn:   prompt as the RL run has it | completion or answer, then the end-of-sequence token
messages:   the conversation up to the assistant's last turn; its turns alone are learned
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.chat import Chat, continued
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.prompts import PromptStream
from sfpo_megatron.data.reading import eval_rows
from sfpo_megatron.data.reasoning_gym import derived_seed
from sfpo_megatron.data.rendering import Renderer
from sfpo_megatron.data.rows import BadRows, Row, same_question
from sfpo_megatron.data.table import MadePrompts
from sfpo_megatron.data.taught import completion_of, messages_of
from sfpo_megatron.data.tokenize import Tokens, tokenized_prompts
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEARNED = "learned"  # key of a prompt's metadata


@dataclass(kw_only=True, frozen=True, slots=True)
class SFTExample:
    """One example, P tokens of prompt and R of response."""

    prompt_ids: tuple[int, ...]  # [P]
    response_ids: tuple[int, ...]  # [R], from the first learned token to the last
    learned: tuple[bool, ...]  # [R], the tokens that the loss is taken on


class SFTExamples:
    """Examples without end, or for `sft.num_epochs`; those held out for a loss beside them. The
    questions of data.eval are held out as they are for the RL run that follows."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int] = (),
        max_context: int | None = None,
        now: str | None = None,
    ) -> None:
        """`stop_ids`: tokens that end a generation, the tokenizer's own aside. `max_context`:
        tokens that the model has positions for. `now`: as for `PromptStream`. DataError for what
        cannot be learned from."""
        if tokenizer.eos_token_id is None:
            raise DataError(
                "model.path",
                found=f"a tokenizer without eos_token ({config.model.path})",
                expected="one that ends a sequence: the policy has to learn to stop",
                fix="set eos_token in tokenizer_config.json",
            )
        self._config, self._tokenizer = config, tokenizer
        self._eos_id = int(tokenizer.eos_token_id)
        self._stop_ids = {self._eos_id, *stop_ids}
        self._limit, self._limit_key = _limit(config, max_context)
        kept_back: list[Row] = []
        tokenize = partial(self._tokenized, kept_back)
        bad = BadRows(config.data.on_bad_row)  # of both, in one report
        self._stream = PromptStream(
            config, tokenizer, now=now, bad=bad, tokenize=tokenize, rewarded=False
        )
        self.held_out = tuple(map(_example, self._held_out(kept_back, bad)))
        """What the held-out loss is taken on; empty where there is none."""
        self.summary = (
            f"{self._stream.summary.replace('training prompts', 'examples')}, "
            f"{len(self.held_out)} for the held-out loss"
        )

    def __len__(self) -> int:
        return len(self._stream.prompts)

    @property
    def epoch_size(self) -> int:
        """Examples that an epoch draws."""
        return self._stream.epoch_size

    @property
    def stream(self) -> PromptStream:
        """The prompts behind their cursor."""
        return self._stream

    def next_batch(self, num_examples: int) -> list[SFTExample]:
        """The next examples, at the end of the last epoch fewer. One after the other: a batch may
        straddle two epochs, and no example is passed over."""
        sft, (epoch, drawn) = self._config.sft, self._stream.place
        if sft.num_epochs is not None:
            left = (sft.num_epochs - epoch) * self.epoch_size - drawn
            num_examples = max(1, min(num_examples, left))
        return [_example(self._stream.next_batch(1)[0]) for _ in range(num_examples)]

    def _held_out(self, kept_back: list[Row], bad: BadRows) -> Iterator[Prompt]:
        config = self._config
        if not config.sft.eval_every:
            bad.settle()
            return
        rows = kept_back if config.sft.holdout else eval_rows(config, bad)
        tokens = Tokens(config, self._tokenizer)
        renderer = Renderer(config, self._tokenizer, self._stream.now)
        found = list(self._learnable(rows, config, tokens, renderer, bad))
        bad.settle()
        if not found:
            raise DataError(
                "sft.holdout" if config.sft.holdout else "data.eval",
                found=f"no row for the held-out loss ({bad})",
                expected="at least one with sft.eval_every set",
                fix="add rows to data.eval, raise sft.holdout, or set sft.eval_every=0",
            )
        yield from found

    def _ended(self, token_ids: list[int]) -> tuple[int, ...]:
        """A text to learn, with the end-of-sequence token behind it unless it ends a generation by
        itself: nothing is generated behind that."""
        if token_ids and token_ids[-1] in self._stop_ids:
            return tuple(token_ids)
        return (*token_ids, self._eos_id)

    def _tokenized(
        self,
        kept_back: list[Row],
        rows: Iterable[Row],
        config: RunConfig,
        tokens: Tokens,
        renderer: Renderer,
        bad: BadRows,
    ) -> MadePrompts:
        """`_learnable` of the rows that are not held out; these go into `kept_back`."""
        share = config.sft.holdout
        learned: list[Row] = []
        for row in rows:
            # By the question alone: it is on the same side in every run, whatever its seed.
            draw = random.Random(derived_seed("holdout", same_question(row.question))).random()
            (kept_back if draw < share else learned).append(row)
        return MadePrompts(self._learnable(learned, config, tokens, renderer, bad))

    def _learnable(
        self,
        rows: Iterable[Row],
        config: RunConfig,
        tokens: Tokens,
        renderer: Renderer,
        bad: BadRows,
    ) -> Iterator[Prompt]:
        """A prompt for each row that can be learned from, with what is learned in its metadata and
        in its answer, so that a checkpoint remembers it."""
        rows = list(rows)
        of_one_turn = [taught for row in rows if (taught := _of_one_turn(row, bad)) is not None]
        tokenizer = self._tokenizer
        made = tokenized_prompts(of_one_turn, config, tokens, renderer, bad, rewarded=False)
        prompts = {prompt.id: prompt for prompt in made}
        answer_of = _answers(prompts, tokenizer, opened=config.data.chat_template)
        has_chats = any(map(messages_of, rows))
        chats = [Chat(tokenizer, self._stop_ids, renderer.variables)] if has_chats else []
        for row in rows:
            if messages := messages_of(row):
                marked = chats[0].marked(messages, row.where)
                if isinstance(marked, DataError):
                    bad.report(marked, row.source)
                    continue
                first = marked.learned.index(True)
                prompt = Prompt(
                    id=row.id,
                    text=row.question,
                    token_ids=marked.token_ids[:first],
                    question=row.question,
                    answer=json.dumps(messages),
                )
                response, learned = marked.token_ids[first:], marked.learned[first:]
            elif row.id in prompts:
                prompt = prompts[row.id]
                response = self._ended(answer_of[row.id])
                learned = (True,) * len(response)
            else:
                continue  # reported as a bad row
            if (length := len(prompt.token_ids) + len(response)) > self._limit:
                bad.report(
                    DataError(
                        row.where,
                        found=f"an example of {length} tokens",
                        expected=f"at most {self._limit} ({self._limit_key})",
                        fix=f"raise {self._limit_key.split(' ')[0]}, or set data.on_bad_row=skip",
                    ),
                    row.source,
                )
                continue
            yield replace(prompt, metadata={_LEARNED: (response, learned)})


def _answers(
    prompts: Mapping[str, Prompt], tokenizer: PreTrainedTokenizerBase, *, opened: bool
) -> dict[str, list[int]]:
    """Token ids of the prompts' answers, by the prompts' ids. `opened`: without the tag of a
    thought with which the prompt ends."""
    if not prompts:
        return {}
    texts = [
        continued(prompt.text, prompt.answer) if opened else prompt.answer
        for prompt in prompts.values()
    ]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return dict(zip(prompts, found, strict=True))


def _of_one_turn(row: Row, bad: BadRows) -> Row | None:
    """The row with its completion as its answer; None for a conversation, and for a bad one, which
    is reported."""
    if messages_of(row):
        return None
    text = completion_of(row)
    if isinstance(text, DataError):
        bad.report(text, row.source)
        return None
    if not text:
        bad.report(
            DataError(
                row.where,
                found="a problem without a reference answer",
                expected="an answer to imitate",
                fix="leave its task out of the warm start; train can use it",
                kind="without a reference",
            ),
            row.source,
        )
        return None
    return replace(row, answer=text)


def _example(prompt: Prompt) -> SFTExample:
    learned: tuple[Any, Any] = prompt.metadata[_LEARNED]
    return SFTExample(
        prompt_ids=prompt.token_ids, response_ids=tuple(learned[0]), learned=tuple(learned[1])
    )


def _limit(config: RunConfig, max_context: int | None) -> tuple[int, str]:
    """Tokens of the longest example, and the key that says so."""
    train = config.train
    limits = [(max_context, "max_position_embeddings of the model's config.json")]
    limits.append((config.sft.max_tokens, "sft.max_tokens"))
    if train.microbatch_size is None:
        room = train.max_tokens_per_microbatch * config.parallel.context
        limits.append((room, "train.max_tokens_per_microbatch x parallel.context"))
    known = [(number, key) for number, key in limits if number is not None]
    return min(known, default=(2**31, "sft.max_tokens"))
