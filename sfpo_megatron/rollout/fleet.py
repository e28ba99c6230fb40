"""The engines: who gets work, who is alive; lost ones are started anew. Their weights: updates.py.

An engine is lost when its process or EngineCore ends, when it has work and finishes none of it for
`rollout.timeout_s`, or when it fails an update or does not finish it within `refit.timeout_s`. Then
it is ended, another is started in its slot with the weights of the model's directory, and it gets
no work until the trainer has sent it the current ones (`wants_weights`). Its unfinished calls are
made again by whoever asks `generate`.

Colocated engines have their devices only between `wake("kv_cache")` and `sleep`. One that is lost
while the trainer has them is replaced after that; one that is lost while the others generate is
replaced at once, beside them, but gets the current weights with the next refit: sending them takes
the trainer back onto the devices, which waits until no engine can generate any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.cluster import ACTOR_GONE, why_gone
from sfpo_megatron.rollout.engine import Memory
from sfpo_megatron.rollout.engine_handle import NO_WEIGHTS, EngineHandle, cause_of
from sfpo_megatron.rollout.errors import (
    EngineDied,
    EngineInterrupted,
    EngineLost,
    FleetLost,
    RolloutError,
    UpdateInterrupted,
)
from sfpo_megatron.rollout.lifeline import ActorProcesses
from sfpo_megatron.rollout.sampling import Completion, GenerationSettings

T = TypeVar("T")
_POLL_S = 1.0
_GONE_S = 10.0
_SHUTDOWN_S = 8.0

log = logging.getLogger(__name__)


class Fleet:
    """Lives in the controller's event loop."""

    def __init__(self, config: RunConfig, spawn: Callable[[int], Any], *, version: int) -> None:
        """`spawn(i)` makes the actor of slot i. `version`: the weights that engines have to hold
        before they get work."""
        self._config = config
        self._spawn = spawn
        self._directory = RunDirectory.of(config.output_dir)
        self.version = version
        self.engines = [
            EngineHandle(index=index, actor=spawn(index))
            for index in range(config.rollout.num_engines)
        ]
        self.num_restarts = 0
        self._num_counted = 0
        """Those that rollout.max_restarts limits: without the engines that another took along."""
        self.num_reissued = 0
        """Rollouts that were asked for again."""
        self._lost_for_good: FleetLost | None = None
        self._colocated = config.rollout.placement == "colocated"
        self._asleep = False
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when every engine can generate. One that does not start ends the run: it is the
        config or the machine."""
        await asyncio.gather(*(self._boot(engine) for engine in self.engines))
        self._in_background(self._watch())

    async def _boot(self, engine: EngineHandle) -> None:
        await self._call(engine, "start", doing="starting")
        engine.processes = ActorProcesses(*await self._call(engine, "processes", doing="starting"))
        engine.ready = not engine.lost
        self.notify()

    async def _watch(self) -> None:
        """Notice the dead while nobody calls them, and the hung."""
        while True:
            await asyncio.sleep(_POLL_S)
            limit_s = self._config.rollout.timeout_s
            ready = [engine for engine in self.engines if engine.ready]
            alive = await asyncio.gather(*(self.alive(engine) for engine in ready))
            for engine, state in zip(ready, alive, strict=True):
                if state is False:
                    self._lose(engine, "died")
                elif engine.num_calls and time.monotonic() - engine.last_progress > limit_s:
                    self._lose(engine, f"finished nothing for rollout.timeout_s={limit_s:g} s")

    async def alive(self, engine: EngineHandle) -> bool | None:
        """None: it did not answer in time."""
        try:
            return await asyncio.wait_for(engine.actor.alive.remote(), timeout=2.0)
        except TimeoutError:
            return None
        except ACTOR_GONE:
            return False

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
        while self._asleep:  # the trainer has the devices
            await self.change()
        engine = EngineHandle(index=old.index, actor=self._spawn(old.index))
        self.engines[old.index] = engine
        try:
            await self._boot(engine)
        except EngineLost:
            pass  # counted, and replaced in turn
        except RolloutError as error:
            self._lose(engine, f"did not start again ({error})")

    async def processes(self) -> list[ActorProcesses]:
        """As far as engines answer; their guards are with them."""
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

    # --- who can work -------------------------------------------------------------------------

    @property
    def can_generate(self) -> bool:
        return any(self._is_current(engine) for engine in self.engines)

    @property
    def wants_weights(self) -> bool:
        """Some engine could work if the trainer sent it the current weights; colocated: and no
        other can."""
        if self._colocated and (self._asleep or self.can_generate):
            return False
        return any(e.ready and e.version != self.version for e in self.engines)

    def check(self) -> None:
        """Raise if engines were lost for good."""
        if self._lost_for_good:
            raise self._lost_for_good

    def notify(self) -> None:
        """Wake who waits in `change`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Until an engine becomes ready, gets weights or is lost."""
        await self._changed.wait()

    def _is_current(self, engine: EngineHandle) -> bool:
        return engine.ready and not self._asleep and engine.version == self.version

    async def _least_busy(self) -> EngineHandle:
        """The engine with the fewest outstanding tokens; waits while there is none."""
        while True:
            self.check()
            current = [engine for engine in self.engines if self._is_current(engine)]
            if current:
                return min(current, key=lambda engine: (engine.outstanding_tokens, engine.index))
            await self.change()

    # --- work ---------------------------------------------------------------------------------

    async def generate(
        self, prompts: list[tuple[int, ...]], seeds: list[int], settings: GenerationSettings
    ) -> tuple[list[Completion], int]:
        """One completion for each (prompt, seed), and the version of the weights that made them."""
        tokens = sum(len(prompt) + settings.max_response_tokens for prompt in prompts)
        while True:
            engine = await self._least_busy()
            version = engine.version
            if engine.num_calls == 0:
                engine.last_progress = time.monotonic()
            engine.outstanding_tokens += tokens
            engine.num_calls += 1
            try:
                made = await self._call(
                    engine, "generate", prompts, seeds, settings, doing="generating"
                )
                return made, version
            except EngineLost:
                self.num_reissued += len(prompts)
            finally:
                engine.outstanding_tokens -= tokens
                engine.num_calls -= 1
                engine.last_progress = time.monotonic()

    async def _call(self, engine: EngineHandle, method: str, *args: Any, doing: str) -> Any:
        """An engine's answer. `EngineLost` if it is gone (and being replaced); `RolloutError` if
        it refused."""
        if engine.lost:
            raise EngineLost
        try:
            return await getattr(engine.actor, method).remote(*args)
        except (*ACTOR_GONE, EngineDied) as error:
            reason = cause_of(error) if isinstance(error, EngineDied) else why_gone(error)
            if method == "start" and not self._tasks:  # the first start of all
                raise RolloutError(self._failure(engine, f"died while {doing}", reason)) from None
            self._lose(engine, f"died while {doing} ({reason})")
            raise EngineLost from None
        except RayTaskError as error:
            interrupted = isinstance(error.cause, UpdateInterrupted)
            kind = EngineInterrupted if interrupted else RolloutError
            raise kind(self._failure(engine, f"failed while {doing}", cause_of(error))) from None

    def _failure(self, engine: EngineHandle, what: str, reason: str) -> str:
        return f"engine {engine.index} {what}: {reason}; its log: {self.log_file(engine.index)}"

    # --- devices that are shared with the trainer ---------------------------------------------

    async def sleep(self) -> None:
        """Every engine gives up its devices' memory, its weights with it. Engines that are starting
        come up first, for at most rollout.timeout_s; of those that are lost nothing is left. No
        engine gets work or is started until `wake("kv_cache")`."""
        self._asleep = True
        deadline = time.monotonic() + self._config.rollout.timeout_s
        while not all(e.gone or (e.ready and e.asleep) for e in self.engines):
            awake = [e for e in self.engines if e.ready and not e.asleep]
            await self._all(awake, "sleep", doing="falling asleep")
            for engine in awake:
                engine.asleep, engine.version = engine.ready, NO_WEIGHTS
            for engine in self.engines:
                if time.monotonic() > deadline and not engine.ready:
                    self._lose(engine, "did not start within rollout.timeout_s")
            await asyncio.sleep(0 if awake else 0.05)

    async def wake(self, memory: Memory) -> None:
        """Every engine takes back memory: for "weights", which an update has to bring next, then
        for "kv_cache". Then engines are replaced that were lost meanwhile."""
        await self._all([e for e in self.engines if e.ready], "wake", memory, doing="waking up")
        if memory == "kv_cache":
            for engine in self.engines:
                engine.asleep = False
            self._asleep = False
            self.notify()

    async def _all(
        self, engines: Sequence[EngineHandle], method: str, *args: Any, doing: str
    ) -> None:
        """Those that fail it or take longer than refit.timeout_s are lost."""
        limit_s = self._config.refit.timeout_s

        async def one(engine: EngineHandle) -> None:
            try:
                await asyncio.wait_for(self._call(engine, method, *args, doing=doing), limit_s)
            except EngineLost:
                pass
            except TimeoutError:
                self._lose(engine, f"took longer than refit.timeout_s={limit_s:g} s for {doing}")
            except RolloutError as error:
                self._lose(engine, f"failed while {doing} ({error})")

        await asyncio.gather(*(one(engine) for engine in engines))

    # --- helpers ------------------------------------------------------------------------------

    def log_file(self, index: int) -> Path:
        return self._directory.engine_log(index)

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _value(call: Awaitable[T]) -> T:
    return await call
