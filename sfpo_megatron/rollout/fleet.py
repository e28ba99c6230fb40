"""The engines as generators: who gets work, and who has the devices.

An engine gets work when it holds the current weights: one that was restarted does not until the
trainer has sent it those (`wants_weights`; updates.py). Unfinished calls of an engine that is lost
(slots.py) are made again, by another.

Colocated engines have their devices only between `wake("kv_cache")` and `sleep`. One that is lost
while the trainer has them is replaced after that; one that is lost while the others generate is
replaced at once, beside them, but gets the current weights with the next refit: sending them takes
the trainer back onto the devices, which waits until no engine can generate any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.rollout.engine import Memory
from sfpo_megatron.rollout.engine_handle import NO_WEIGHTS, EngineHandle
from sfpo_megatron.rollout.errors import EngineLost, RolloutError
from sfpo_megatron.rollout.handles import EngineActor
from sfpo_megatron.rollout.sampling import Completion, GenerationSettings
from sfpo_megatron.rollout.slots import EngineSlots, SpawnEngine


class Fleet(EngineSlots):
    """Engines that generate."""

    def __init__(
        self, config: RunConfig, spawn: SpawnEngine, *, version: int, has_sent: bool = False
    ) -> None:
        """`version`: the weights that engines have to hold before they get work; `has_sent`: no
        engine starts with them."""
        super().__init__(config, spawn, has_sent=has_sent)
        self.version = version
        self.num_reissued = 0
        """Number of rollouts that were asked for again."""
        self._colocated = config.rollout.placement == "colocated"

    # --- who can work -------------------------------------------------------------------------

    @property
    def can_generate(self) -> bool:
        """Whether some engine can work."""
        return any(self._is_current(engine) for engine in self.engines)

    @property
    def wants_weights(self) -> bool:
        """Whether some engine could work if the trainer sent it the current weights; colocated: and
        no other can."""
        if self._colocated and (self._devices_are_taken or self.can_generate):
            return False
        return any(e.ready and e.version != self.version for e in self.engines)

    def _is_current(self, engine: EngineHandle) -> bool:
        return engine.ready and not self._devices_are_taken and engine.version == self.version

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
        self,
        prompts: list[tuple[int, ...]],
        seeds: list[int],
        settings: list[GenerationSettings],
    ) -> tuple[list[Completion], int]:
        """One completion for each (prompt, seed, settings), and the version of the weights that
        made them. Cancelled, it frees the engine."""
        tokens = sum(map(len, prompts)) + sum(one.max_response_tokens for one in settings)
        while True:
            engine = await self._least_busy()
            version = engine.version
            if engine.num_calls == 0:
                engine.last_progress = time.monotonic()
            engine.outstanding_tokens += tokens
            engine.num_calls += 1
            try:
                made = await self._call(
                    engine,
                    lambda actor: _while_awaited(actor.generate.remote(prompts, seeds, settings)),
                    doing="generating",
                )
                return made, version
            except EngineLost:
                self.num_reissued += len(prompts)
            finally:
                engine.outstanding_tokens -= tokens
                engine.num_calls -= 1
                engine.last_progress = time.monotonic()

    # --- devices that are shared with the trainer ---------------------------------------------

    async def sleep(self) -> None:
        """Every engine gives up its devices' memory, its weights with it. Engines that are starting
        come up first, for at most rollout.timeout_s; of those that are lost nothing is left. No
        engine gets work or is started until `wake("kv_cache")`."""
        self._devices_are_taken = True
        deadline = time.monotonic() + self._config.rollout.timeout_s
        while not all(e.gone or (e.ready and e.asleep) for e in self.engines):
            awake = [e for e in self.engines if e.ready and not e.asleep]
            await self._all(awake, lambda actor: actor.sleep.remote(), doing="falling asleep")
            for engine in awake:
                engine.asleep, engine.version = engine.ready, NO_WEIGHTS
            for engine in self.engines:
                if time.monotonic() > deadline and not engine.ready:
                    self._lose(engine, "did not start within rollout.timeout_s")
            await asyncio.sleep(0 if awake else 0.05)

    async def wake(self, memory: Memory) -> None:
        """Every engine takes back memory: for "weights", which an update has to bring next, then
        for "kv_cache". Then engines are replaced that were lost meanwhile."""
        ready = [engine for engine in self.engines if engine.ready]
        await self._all(ready, lambda actor: actor.wake.remote(memory), doing="waking up")
        if memory == "kv_cache":
            for engine in self.engines:
                engine.asleep = False
            self._devices_are_taken = False
            self.notify()

    async def _all(
        self,
        engines: Sequence[EngineHandle],
        call: Callable[[EngineActor], Awaitable[None]],
        *,
        doing: str,
    ) -> None:
        """Make a call on all `engines`; those that fail it or take longer than refit.timeout_s are
        lost."""
        limit_s = self._config.refit.timeout_s

        async def one(engine: EngineHandle) -> None:
            try:
                await asyncio.wait_for(self._call(engine, call, doing=doing), limit_s)
            except EngineLost:
                pass
            except TimeoutError:
                self._lose(engine, f"took longer than refit.timeout_s={limit_s:g} s for {doing}")
            except RolloutError as error:
                self._lose(engine, f"failed while {doing} ({error})")

        await asyncio.gather(*(one(engine) for engine in engines))


async def _while_awaited(answer: Any) -> Any:
    """The answer to a call, which Ray would let run on once nobody waits for it."""
    try:
        return await answer
    except asyncio.CancelledError:
        ray.cancel(answer)
        raise
