"""A model that says what it is told to, and clients of the endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from sfpo_megatron.rollout.sampling import Completion, branch_seed, call_seed

END = "<|im_end|>"


class Says:
    """`generate` that says `turns` one after the other, letter by letter, as no tokenizer writes
    them; the log-probs count down. Keeps the tokens and the seed of each call."""

    temperature, top_p = 0.7, 0.9

    def __init__(
        self, tokenizer: Any, *turns: str, context_tokens: int = 100_000, seed: int = 3
    ) -> None:
        self.tokenizer, self.turns, self.context_tokens = tokenizer, list(turns), context_tokens
        self.asked: list[tuple[int, ...]] = []
        self.seeds: list[int] = []
        self._seed, self._number = seed, 0

    async def __call__(
        self, token_ids: Sequence[int], *, seed: int | None = None, max_tokens: int | None = None
    ) -> Completion:
        self.asked.append(tuple(token_ids))
        self.seeds.append(call_seed(self._seed, self._number))
        self._number += 1
        turn = self.turns.pop(0)
        await asyncio.sleep(0.001)
        spelt = self.spelt(turn)[:max_tokens]
        logprobs = tuple(-float(i + 1) for i in range(len(spelt)))
        finished = spelt[-1:] == [self.tokenizer.eos_token_id]
        return Completion(token_ids=tuple(spelt), logprobs=logprobs, finished=finished)

    def branch(self, number: int) -> Says:
        made = Says(self.tokenizer, seed=branch_seed(self._seed, number))
        made.turns, made.asked, made.seeds = self.turns, self.asked, self.seeds
        made.context_tokens = self.context_tokens
        return made

    def spelt(self, text: str) -> list[int]:
        ids = self.tokenizer.convert_tokens_to_ids
        body, end, rest = text.partition(END)
        assert not rest
        tokens = self.tokenizer(body, add_special_tokens=False)["input_ids"]
        letters = [ids(x) for t in self.tokenizer.convert_ids_to_tokens(tokens) for x in t]
        return [*letters, *([ids(END)] if end else [])]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def events(body: str) -> list[Any]:
    """What a stream holds; its end is checked."""
    lines = [line for line in body.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]
