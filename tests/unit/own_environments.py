"""Environments of a user's own, right and wrong, for the tests of episodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from sfpo_megatron.rollout.episodes import Episode, Generate, GenerateAll
from sfpo_megatron.types import Prompt


class Base:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


class Turns(Base):
    """Three calls: on the prompt, on all so far, on something else with fewer tokens."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        episode = Episode().then(await generate(prompt.token_ids))
        episode = episode.told([50])
        episode = episode.then(await generate((*prompt.token_ids, *episode.token_ids)))
        last = await generate([9, 9], seed=seed + 1, max_tokens=2)
        return replace(episode, reward=0.5, metrics={"last": len(last.token_ids)})


class Full(Base):
    """Asks until nothing comes."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        episode = Episode()
        while True:
            completion = await generate((*prompt.token_ids, *episode.token_ids))
            if not completion.token_ids:
                assert not completion.finished
                return episode
            episode = episode.then(completion)


class Long(Base):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        episode = Episode().then(await generate(prompt.token_ids)).told(range(1, 20))
        return replace(episode, finished=True)


class Silent(Base):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        return Episode().told([3])


class Branches(Base):
    """Two branches of two calls each, then the rollout's own."""

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        async def two(number: int) -> None:
            branch = generate.branch(number)
            await branch([number])
            await branch([number, number])

        await asyncio.gather(two(1), two(2))
        return Episode().then(await generate(prompt.token_ids))


class Rewarded(Base):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        episode = Episode().then(await generate(prompt.token_ids), reward=0.5)
        return episode.told([1]).then(await generate([1]), reward=0.25)


class Settings(Base):
    made: ClassVar[tuple[Any, ...]] = ()
    uses_chat_template = True

    def __init__(self, tokenizer: Any, *, size: int = 1, chat_template_args: Any = ()) -> None:
        type(self).made = (size, chat_template_args)

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        return Episode()

    def close(self) -> None:
        type(self).made = ()


class Raises(Base):
    ended: ClassVar[list[str]] = []

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        if prompt.id == "p/1":
            raise LookupError("no such tool")
        try:
            await asyncio.sleep(60)
        finally:
            self.ended.append(prompt.id)


class Asks(Base):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        return Episode().then(await generate(prompt.token_ids))


class Returns(Base):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        return EPISODES[prompt.id]


class FewInBatch(Asks):
    async def run_batch(
        self, prompts: Sequence[Prompt], generate: GenerateAll, seeds: Sequence[int]
    ) -> list[Episode]:
        return []


class CancelsItself(Asks):
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        raise asyncio.CancelledError


class Broken(Asks):
    def __init__(self, tokenizer: Any) -> None:
        raise OSError("no index")


class NoTokenizer:
    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode: ...


class NotAsync(Base):
    def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode: ...


class NoSeed(Base):
    async def run(self, prompt: Prompt, generate: Generate) -> Episode: ...


class NoRun(Base):
    pass


def function(tokenizer: Any) -> None: ...


EPISODES: dict[str, Any] = {
    "none": None,
    "lengths": Episode(token_ids=(1, 2), logprobs=(0.0,), response_mask=(True, True)),
    "nan": Episode(token_ids=(1,), logprobs=(float("nan"),), response_mask=(True,)),
    "nothing": Episode(token_ids=(1,), logprobs=(None,), response_mask=(True,)),
    "reward": Episode(reward=float("inf")),
    "turns": Episode(turn_rewards=float("nan")),
    "metric": Episode(metrics={"x": "text"}),
    "huge": Episode(metrics={"x": 10**400}),
    "name": Episode(metrics={"\ud83d": 1.0}),
    "fine": Episode(token_ids=(1,), logprobs=(float("nan"),), response_mask=(False,)),
}
