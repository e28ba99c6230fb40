"""The engines' lives: each slot has one, and one that is lost is replaced by another.

An engine is lost when its process or EngineCore ends, when it has work and finishes none of it for
`rollout.timeout_s`, or when a call to it fails for good. Then it is ended, and another is started
in its slot with the weights of the model's directory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import RayTaskError

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.start_stages import stage_in
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.cluster import ACTOR_GONE, why_gone
from sfpo_megatron.rollout.engine_handle import NO_WEIGHTS, EngineHandle, cause_of
from sfpo_megatron.rollout.errors import (
    EngineDied,
    EngineInterrupted,
    EngineLost,
    FleetLost,
    RolloutError,
    UpdateInterrupted,
)
from sfpo_megatron.rollout.handles import EngineActor
from sfpo_megatron.rollout.lifeline import ActorProcesses
from sfpo_megatron.rollout.reports import EngineLoad
from sfpo_megatron.rollout.root_cause import EngineLog

T = TypeVar("T")
SpawnEngine = Callable[[int], EngineActor]
"""Starts the actor of a slot."""
START_S = 600.0
"""Shortest limit of a start, which reads model.path, whatever rollout.timeout_s is."""
_POLL_S = 1.0
_ALIVE_S = 2.0
_GONE_S = 10.0
_SHUTDOWN_S = 8.0

log = logging.getLogger(__name__)


class EngineSlots:
    """Lives in the controller's event loop."""

    def __init__(self, config: RunConfig, spawn: SpawnEngine, *, has_sent: bool) -> None:
        """`has_sent`: whether the trainer has sent weights, so that those of model.path, with which
        an engine starts, count as none."""
        self._has_sent = has_sent
        self._config = config
        self._spawn = spawn
        self._directory = RunDirectory.of(config.output_dir)
        self.engines = [self._spawned(index) for index in range(config.rollout.num_engines)]
        self.num_restarts = 0
        self._num_counted = 0
        """Restarts that rollout.max_restarts limits: not of engines that another took along."""
        self._lost_for_good: FleetLost | None = None
        self._has_started = False
        self._devices_are_taken = False
        """Whether the trainer has colocated engines' devices: none is started until it gives them
        back."""
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- from start to shutdown ---------------------------------------------------------------

    async def start(self) -> None:
        """Return when every engine can generate. One that does not start ends the run."""
        await asyncio.gather(*(self._boot(engine) for engine in self.engines))
        self._has_started = True
        self._in_background(self._watch())

    def _spawned(self, index: int) -> EngineHandle:
        log, version = EngineLog(self.log_file(index)), NO_WEIGHTS if self._has_sent else 0
        return EngineHandle(index=index, actor=self._spawn(index), log=log, version=version)

    @property
    def starting(self) -> tuple[str, ...]:
        """What each engine that is starting is at."""
        engines = [engine for engine in self.engines if not (engine.ready or engine.lost)]
        stages = {one.index: stage_in(one.log.text()) or "starting" for one in engines}
        return tuple(f"engine {index} is {stage}" for index, stage in stages.items())

    async def _boot(self, engine: EngineHandle) -> None:
        await self._call(engine, lambda actor: actor.start.remote(), doing="starting")
        found = await self._call(engine, lambda actor: actor.processes.remote(), doing="starting")
        engine.processes = ActorProcesses(*found)
        engine.ready = not engine.lost
        self.notify()

    async def _watch(self) -> None:
        """Notice the dead while nobody calls them, and the hung."""
        while True:
            await asyncio.sleep(_POLL_S)
            limit_s = self._config.rollout.timeout_s
            ready = [engine for engine in self.engines if engine.ready]
            alive = await asyncio.gather(*(self.alive(engine) for engine in ready))
            await asyncio.gather(*(self._look_at(one) for one in ready if one.num_calls))
            for engine, state in zip(ready, alive, strict=True):
                if state is False:
                    self._lose(engine, "died")
                elif engine.num_calls and time.monotonic() - engine.last_progress > limit_s:
                    self._lose(engine, f"made no step for rollout.timeout_s={limit_s:g} s")

    async def alive(self, engine: EngineHandle) -> bool | None:
        """Whether an engine is alive; None if it did not answer in time."""
        try:
            return await asyncio.wait_for(engine.actor.alive.remote(), timeout=_ALIVE_S)
        except TimeoutError:
            return None
        except ACTOR_GONE:
            return False

    async def _look_at(self, engine: EngineHandle) -> None:
        """Note whether vLLM has made a step: a call ends with its longest response, which may take
        longer than an engine may hang."""
        try:
            num_steps = await asyncio.wait_for(engine.actor.num_steps.remote(), _ALIVE_S)
        except (TimeoutError, RayTaskError, *ACTOR_GONE):
            return
        if num_steps != engine.num_steps:
            engine.num_steps, engine.last_progress = num_steps, time.monotonic()

    async def take_load(self) -> EngineLoad:
        """How full and busy the engines were since the last call; one that does not answer in time
        is left out."""

        async def one(engine: EngineHandle) -> list[EngineLoad]:
            try:
                return [await asyncio.wait_for(engine.actor.take_load.remote(), _ALIVE_S)]
            except (TimeoutError, RayTaskError, *ACTOR_GONE):
                return []

        found = await asyncio.gather(*(one(engine) for engine in self.engines))
        return EngineLoad.of_all([load for loads in found for load in loads])

    async def processes(self) -> list[ActorProcesses]:
        """Processes of the engines that answer; their guards are with them."""
        answers = (engine.actor.processes.remote() for engine in self.engines)
        found = await asyncio.gather(*answers, return_exceptions=True)
        return [ActorProcesses(*x) for x in found if not isinstance(x, BaseException)]

    async def shutdown(self) -> None:
        """End every engine in good order; their guards catch what is left."""
        for task in self._tasks:
            task.cancel()
        for engine in self.engines:
            engine.lost = True
        stops = [asyncio.ensure_future(_value(e.actor.shutdown.remote())) for e in self.engines]
        await asyncio.wait(stops, timeout=_SHUTDOWN_S)

    # --- losses -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if engines were lost for good."""
        if self._lost_for_good:
            raise self._lost_for_good

    def _lose(self, engine: EngineHandle, reason: str, *, counts: bool = True) -> None:
        """End an engine and start another in its place; the rest goes on."""
        if engine.lost:
            return
        engine.lost, engine.ready = True, False
        message = f"engine {engine.index} {reason}; its log: {self.log_file(engine.index)}"
        log.warning("%s", message)
        ray.kill(engine.actor)  # its guard ends what it leaves behind
        if counts and self._num_counted >= self._config.rollout.max_restarts:
            self._lost_for_good = FleetLost(
                f"{message}; that is one more than rollout.max_restarts="
                f"{self._config.rollout.max_restarts} allows in a run"
            )
            self._in_background(self._until_gone(engine))
        else:
            self.num_restarts += 1
            self._num_counted += counts
            self._in_background(self._replace(engine))
        self.notify()

    async def _until_gone(self, engine: EngineHandle) -> None:
        members = engine.processes.members if engine.processes else ()
        deadline = time.monotonic() + _GONE_S  # a GPU's memory is free when they are gone
        while any(member.alive for member in members) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        engine.gone = True
        self.notify()

    async def _replace(self, old: EngineHandle) -> None:
        await self._until_gone(old)
        while self._devices_are_taken:
            await self.change()
        engine = self._spawned(old.index)
        self.engines[old.index] = engine
        with suppress(EngineLost):  # counted, and replaced in turn
            try:
                async with asyncio.timeout(max(self._config.rollout.timeout_s, START_S)):
                    await self._boot(engine)
            except (TimeoutError, RolloutError) as error:
                self._lose(engine, f"did not start again ({str(error) or 'it hangs'})")

    # --- calls and news -----------------------------------------------------------------------

    async def _call(
        self, engine: EngineHandle, call: Callable[[EngineActor], Awaitable[T]], *, doing: str
    ) -> T:
        """An engine's answer. `EngineLost` if it is gone (and being replaced); `RolloutError` if
        it refused."""
        if engine.lost:
            raise EngineLost
        try:
            return await call(engine.actor)
        except (*ACTOR_GONE, EngineDied) as error:
            reason = cause_of(error) if isinstance(error, EngineDied) else why_gone(error)
            if not self._has_started:
                raise RolloutError(self._failure(engine, f"died while {doing}", reason)) from None
            self._lose(engine, f"died while {doing} ({reason})")
            raise EngineLost from None
        except RayTaskError as error:
            interrupted = isinstance(error.cause, UpdateInterrupted)
            kind = EngineInterrupted if interrupted else RolloutError
            raise kind(self._failure(engine, f"failed while {doing}", cause_of(error))) from None

    def _failure(self, engine: EngineHandle, what: str, reason: str) -> str:
        return f"engine {engine.index} {what}: {reason}; its log: {self.log_file(engine.index)}"

    def log_file(self, index: int) -> Path:
        """File that the engine of slot `index` logs to."""
        return self._directory.engine_log(index)

    def notify(self) -> None:
        """Wake who waits in `change`."""
        self._changed.set()
        self._changed = asyncio.Event()

    def change(self) -> Awaitable[bool]:
        """Wait until an engine becomes ready, gets weights or is lost, from this call on: a task
        that waits may begin later."""
        return self._changed.wait()

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _value(call: Awaitable[T]) -> T:
    return await call
