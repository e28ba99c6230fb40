"""A fleet whose engines are stand-ins for Ray's actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from made.configs import run_config
from ray.exceptions import ActorDiedError, RayTaskError

from sfpo_megatron.rollout.errors import UpdateInterrupted
from sfpo_megatron.rollout.sampling import GenerationSettings
from sfpo_megatron.rollout.updates import UpdatableFleet as Fleet

SETTINGS = GenerationSettings(temperature=1.0, top_p=1.0, max_response_tokens=10, stop_token_ids=())


class Answer:
    """What Ray gives for a call, which goes on whether or not it is awaited."""

    def __init__(self, call: Coroutine[Any, Any, Any]) -> None:
        self.task = asyncio.ensure_future(call)

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self.task).__await__()


class Method:
    def __init__(self, call: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.remote = lambda *args: Answer(call(*args))


class Actor:
    """Answers as an engine's actor would; `dead` or `hung` it does not."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.dead = asyncio.Event()
        self.hangs: set[str] = set()
        self.interrupted = False
        self.calls: list[Any] = []
        self.seeds: list[list[int]] = []
        self.release = asyncio.Event()
        self.release.set()
        self.may_start = asyncio.Event()
        self.may_start.set()

    def __getattr__(self, name: str) -> Method:
        async def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            if name == "generate":
                self.seeds.append(args[1])
            work = asyncio.ensure_future(self.answer(name, *args))
            death = asyncio.ensure_future(self.dead.wait())
            try:
                await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self.calls.append(("cancelled", name))
                raise
            if self.dead.is_set():
                raise ActorDiedError
            return work.result()

        return Method(call)

    async def answer(self, name: str, *args: Any) -> Any:
        if name in self.hangs:
            await asyncio.sleep(1000)
        if name == "start":
            await self.may_start.wait()
        if name == "finish_weight_update" and self.interrupted:
            self.interrupted = False
            raise RayTaskError(name, "", UpdateInterrupted("round 3"))
        if name == "generate":
            await self.release.wait()
            return [f"made by {self.index}" for _ in args[1]]
        return {"alive": True, "num_steps": 0, "processes": ((), None)}.get(name)


def make_fleet(
    actors: list[Actor],
    kind: type[Actor] = Actor,
    *,
    transport: Any = "auto",
    refit_timeout_s: float = 0.2,
    has_sent: bool = False,
    **rollout: Any,
) -> Fleet:
    def spawn(index: int) -> Actor:
        actors.append(kind(index))
        return actors[-1]

    config = run_config(
        rollout={"num_engines": 2} | rollout,
        refit={"timeout_s": refit_timeout_s, "transport": transport},
    )
    return Fleet(config, spawn, version=0, has_sent=has_sent)


def calls_of(actor: Actor, method: str) -> list[Any]:
    return [arguments for name, *arguments in actor.calls if name == method]


def job(fleet: Fleet, num_tokens: int, seeds: tuple[int, ...] = (1,)) -> asyncio.Task[Any]:
    prompts = [tuple(range(num_tokens))] * len(seeds)
    return asyncio.create_task(fleet.generate(prompts, list(seeds), [SETTINGS] * len(seeds)))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def update(fleet: Fleet, version: int, *, only_stale: bool = False) -> None:
    await fleet.introduce({})
    await fleet.start_update(version, only_stale=only_stale)
    await fleet.load_bucket({}, 0)
    await fleet.finish_update()
