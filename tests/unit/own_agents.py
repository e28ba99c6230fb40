"""Agents of a user's own, right and wrong, for the tests of the environment that runs them."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import openai

from sfpo_megatron.types import Prompt

hanging: set[str] = set()


class Chat:
    """What an agent has said and was told."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.http = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        self.messages: list[Any] = []

    async def say(self, content: str, **more: Any) -> str:
        self.messages.append({"role": "user", "content": content})
        ask = self.http.chat.completions.create
        answer = await ask(model="policy", messages=self.messages, **more)
        self.messages.append(answer.choices[0].message)
        return str(answer.choices[0].message.content)


async def impatient(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    """Gives its only request up before the answer."""
    http = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=1, timeout=0.3)
    messages: Any = [{"role": "user", "content": prompt.question}]
    await http.chat.completions.create(model="policy", messages=messages)


async def gives_up(base_url: str, api_key: str, prompt: Prompt, seed: int) -> float:
    """Catches that, and says what it thinks of it."""
    try:
        await impatient(base_url, api_key, prompt, seed)
    except openai.APITimeoutError:
        return 0.0
    raise AssertionError("answered")


async def polite(
    base_url: str, api_key: str, prompt: Prompt, seed: int, *, end: str = "Bye."
) -> Any:
    """Two turns, and reward.function scores the second."""
    chat = Chat(base_url, api_key)
    await chat.say(prompt.question)
    await chat.say(end)


async def number(base_url: str, api_key: str, prompt: Prompt, seed: int) -> float:
    return float(await Chat(base_url, api_key).say(prompt.question))


async def measured(base_url: str, api_key: str, prompt: Prompt, seed: int) -> dict[str, float]:
    said = await Chat(base_url, api_key).say(prompt.question)
    return {"reward": float(said), "seed": float(seed), "length": len(said)}


async def forgetful(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    """Its second request has nothing of the first."""
    for question in ("1", "2"):
        await Chat(base_url, api_key).say(question)


async def hangs(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    await Chat(base_url, api_key).say(prompt.question)
    hanging.add(prompt.id)
    try:
        await asyncio.sleep(60)
    finally:
        hanging.remove(prompt.id)


async def cancels_itself(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    """Frameworks of task groups do so when a child fails."""
    await Chat(base_url, api_key).say(prompt.question)
    raise asyncio.CancelledError


async def blocks(base_url: str, api_key: str, prompt: Prompt, seed: int) -> float:
    """A client that is not asynchronous."""
    http = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    message: Any = {"role": "user", "content": prompt.question}
    answer = http.chat.completions.create(model="policy", messages=[message])
    time.sleep(0.05)
    return float(str(answer.choices[0].message.content))


async def endless(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    chat = Chat(base_url, api_key)
    while True:
        await chat.say("Go on. " * 10)


async def raises_late(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    await Chat(base_url, api_key).say(prompt.question)
    raise LookupError("no such page")


async def leaves_with_3(base_url: str, api_key: str, prompt: Prompt, seed: int) -> float:
    """Calls `sys.exit` after its turn where the seed is 3."""
    said = await Chat(base_url, api_key).say(prompt.question)
    if seed == 3:
        sys.exit("no licence")
    await asyncio.sleep(0.3)
    return float(said)


async def raises_early(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    raise LookupError("no such page")


async def silent(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None:
    pass


async def text(base_url: str, api_key: str, prompt: Prompt, seed: int) -> Any:
    return await Chat(base_url, api_key).say(prompt.question)


async def swallows(base_url: str, api_key: str, prompt: Prompt, seed: int) -> float:
    try:
        await Chat(base_url, api_key).say(prompt.question)
    except openai.APIError:
        pass
    await asyncio.sleep(60)
    return 1.0


def not_async(base_url: str, api_key: str, prompt: Prompt, seed: int) -> None: ...


async def no_seed(base_url: str, api_key: str, prompt: Prompt) -> None: ...
