"""Calls of many episodes as batches that only the episodes decide: `rollout.reproducible`.

An engine's logits depend, in their last bits, on the batch. So a call waits until every episode
that is still under way has made one, or has ended: call n of all of them goes to the engines
together, in the episodes' order. How long a tool, an engine or the event loop takes changes
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.sampling import ROLLOUTS_PER_CALL, Completion, GenerationSettings

T = TypeVar("T")


class Generator(Protocol):
    """The fleet, as far as episodes need it."""

    version: int
    """Version of the weights that engines generate with."""

    async def generate(
        self,
        prompts: list[tuple[int, ...]],
        seeds: list[int],
        settings: list[GenerationSettings],
    ) -> tuple[list[Completion], int]:
        """One completion for each (prompt, seed, settings), and the version of the weights that
        made them."""
        ...


@dataclass(kw_only=True, frozen=True, slots=True)
class _Call:
    """A call that waits for its batch."""

    token_ids: tuple[int, ...]
    seed: int
    settings: GenerationSettings
    answer: asyncio.Future[tuple[Completion, int]]


class Lockstep:
    """The barrier between the episodes, by number, and the engines."""

    def __init__(self, fleet: Generator, num_episodes: int) -> None:
        self.fleet = fleet
        self.versions: set[int] = set()
        """Versions of the weights that have answered."""
        self._live = set(range(num_episodes))
        self._asking: set[int] = set()  # a call waits, or is being answered
        self._waiting: dict[int, _Call] = {}
        self._changed = asyncio.Event()

    async def run(self, episodes: Iterable[Coroutine[None, None, T]]) -> list[T]:
        """What the episodes give, whose calls come by `generate`; when one raises, the others are
        cancelled."""
        results: dict[int, T] = {}

        async def play(number: int, episode: Coroutine[None, None, T]) -> None:
            results[number] = await episode
            self._live.remove(number)
            self._changed.set()

        playing = [play(number, episode) for number, episode in enumerate(episodes)]
        await together([*playing, self._serve()])
        return [results[number] for number in range(len(playing))]

    async def generate(
        self, episode: int, token_ids: tuple[int, ...], seed: int, settings: GenerationSettings
    ) -> tuple[Completion, int]:
        """The next call of an episode, answered with its batch."""
        if episode in self._asking:
            raise RolloutError(
                "rollout.reproducible: found a second call of `generate` beside another one of the "
                "same episode, expected one at a time (in which batch it would be is left to "
                "chance); await the first one, or set rollout.reproducible=false"
            )
        answer = asyncio.get_running_loop().create_future()
        call = _Call(token_ids=token_ids, seed=seed, settings=settings, answer=answer)
        self._asking.add(episode)
        self._waiting[episode] = call
        self._changed.set()
        try:
            return await answer
        finally:
            self._asking.discard(episode)
            self._waiting.pop(episode, None)

    async def _serve(self) -> None:
        """Answer batch after batch, until all episodes have ended."""
        while self._live:
            await self._changed.wait()
            self._changed.clear()
            if self._live and self._live <= self._waiting.keys():
                await self._answer([self._waiting.pop(one) for one in sorted(self._live)])

    async def _answer(self, calls: list[_Call]) -> None:
        starts = range(0, len(calls), ROLLOUTS_PER_CALL)
        parts = [calls[start : start + ROLLOUTS_PER_CALL] for start in starts]
        await together(map(self._answer_part, parts))

    async def _answer_part(self, calls: list[_Call]) -> None:
        made, version = await self.fleet.generate(
            [call.token_ids for call in calls],
            [call.seed for call in calls],
            [call.settings for call in calls],
        )
        self.versions.add(version)
        for call, completion in zip(calls, made, strict=True):
            if not call.answer.done():  # the environment has stopped waiting
                call.answer.set_result((completion, version))


async def together(works: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """The results of all; when one raises, the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
