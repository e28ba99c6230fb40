"""A model that says what it is told to, and clients of the endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import aiohttp

from sfpo_megatron.rollout.endpoint.protocol import Sampling
from sfpo_megatron.rollout.endpoint.server import Endpoint
from sfpo_megatron.rollout.endpoint.session import Session
from sfpo_megatron.rollout.endpoint.templates import ChatTemplates
from sfpo_megatron.rollout.sampling import Completion, branch_seed, call_seed

END = "<|im_end|>"
MAX_BYTES = 20_000


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


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def events(body: str) -> list[Any]:
    """What a stream holds; its end is checked."""
    lines = [line for line in body.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@lru_cache(maxsize=4)
def templates_of(tokenizer: Any) -> ChatTemplates:
    return ChatTemplates(tokenizer, {}, [tokenizer.eos_token_id])


@dataclass
class Client:
    """One session and one who asks it."""

    endpoint: Endpoint
    session: Session
    says: Says
    key: str

    async def post(
        self, body: Any, *, key: str | None = None, path: str = "chat/completions"
    ) -> Any:
        """(status, JSON or the stream's text)."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        data = body if isinstance(body, bytes) else json.dumps(body)
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.endpoint.base_url}/{path}", data=data, headers=headers) as answer,
        ):
            if answer.content_type == "text/event-stream":
                return answer.status, await answer.text()
            return answer.status, await answer.json()

    async def say(self, messages: list[Any], **more: Any) -> Any:
        """The first choice of an answer that is one."""
        status, body = await self.post({"model": "m", "messages": messages, **more})
        assert status == 200, body
        return body["choices"][0]


@contextlib.asynccontextmanager
async def client_of(endpoint: Endpoint, says: Says, **more: Any) -> Any:
    async def made() -> Session:
        return Session(
            templates_of(says.tokenizer),
            says,
            call_format=more.get("call", "hermes"),
            max_response_tokens=more.get("max_response_tokens", says.context_tokens),
        )

    session = await endpoint.thread.start(made())
    with endpoint.serving(session, Sampling(temperature=says.temperature, top_p=says.top_p)) as key:
        yield Client(endpoint, session, says, key)
