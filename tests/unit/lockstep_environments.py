"""Environments for test_lockstep.py: what stands between their calls takes any time."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.types import Prompt


class Paced:
    """Has as many turns as the prompt's first token, with a pause of its own before each."""

    pauses: ClassVar[dict[tuple[str, int], float]] = {}
    ended: ClassVar[list[str]] = []

    def __init__(self, tokenizer: Any) -> None:
        """It has no use for the tokenizer."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        episode = Episode()
        try:
            for turn in range(prompt.token_ids[0]):
                await asyncio.sleep(self.pauses.get((prompt.id, turn), 0.0))
                context = (*prompt.token_ids, *episode.token_ids)
                episode = episode.then(await generate(context, max_tokens=1)).told([turn])
        finally:
            self.ended.append(prompt.id)
        return episode


class Fails(Paced):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        if prompt.id == "p/1":
            await generate(prompt.token_ids)
            raise LookupError("no such tool")
        return await super().run(prompt, generate, seed)


class Hangs(Paced):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        if prompt.id == "p/1":
            await asyncio.sleep(60)
        return await super().run(prompt, generate, seed)


class Branches(Paced):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        return Episode().then(await generate.branch(1)(prompt.token_ids))


class AtOnce(Paced):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        first, _ = await asyncio.gather(generate(prompt.token_ids), generate([9]))
        return Episode().then(first)


class Impatient(Paced):
    """The second of two stops waiting for its first call."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        if prompt.id == "p/1":
            try:
                async with asyncio.timeout(0.01):
                    await generate(prompt.token_ids)
            except TimeoutError:
                pass
            return Episode().then(await generate([8]))
        await asyncio.sleep(0.05)
        return Episode().then(await generate(prompt.token_ids))
