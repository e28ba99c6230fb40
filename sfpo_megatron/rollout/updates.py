"""The engines' weights: who takes part in an update, and what becomes of those that fail it.

Where engines share communicators, the end of one interrupts the update of the others. These live
on with a mixture of weights and are sent everything again, once: an engine that is interrupted
twice in a row is lost too. vLLM's own nccl and nccl_m2n cannot leave a broadcast: there all that
took part are lost, and counted as one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.spans import span
from sfpo_megatron.rollout.engine import WireInfo
from sfpo_megatron.rollout.engine_handle import NO_WEIGHTS, EngineHandle
from sfpo_megatron.rollout.errors import EngineInterrupted, EngineLost, FleetLost, RolloutError
from sfpo_megatron.rollout.fleet import Fleet
from sfpo_megatron.rollout.handles import EngineActor
from sfpo_megatron.rollout.slots import SpawnEngine

_MAX_FAILED_MEETINGS = 3

log = logging.getLogger(__name__)


class UpdatableFleet(Fleet):
    """A fleet that takes new weights."""

    def __init__(
        self, config: RunConfig, spawn: SpawnEngine, *, version: int, has_sent: bool = False
    ) -> None:
        super().__init__(config, spawn, version=version, has_sent=has_sent)
        self._target = version
        self._updating: list[EngineHandle] = []
        self._only_stale = False
        self._deadline = 0.0
        self._loss_counted = False
        """A loss has already been counted for this update."""
        self._connected: list[EngineHandle] = []
        """Engines that share the communicators of the trainer's sending end."""
        self._num_failed_meetings = 0

    def participants(self, *, only_stale: bool) -> list[EngineHandle]:
        """Engines that would take part in an update: all, or those without the current weights."""
        return [e for e in self.engines if e.ready and not (only_stale and self._is_current(e))]

    def needs_introduction(self, *, only_stale: bool = False) -> bool:
        """Whether some engine does not know the trainer's sending end, or others than those that
        will take part wait in its communicators."""
        participants = self.participants(only_stale=only_stale)
        if self._shared and participants != self._connected:
            return True
        return not all(engine.introduced for engine in participants)

    async def introduce(self, init_info: WireInfo, *, only_stale: bool = False) -> int:
        """Tell engines of a sending end: those that will take part where they share communicators,
        else all; how many. Raises where one expects other tensors. Communicators have a place for
        each engine's workers (`_numbered`)."""
        shared, workers = self._shared, self._config.rollout.tensor_parallel
        ready = self.participants(only_stale=only_stale and shared)
        if "world_size" in init_info:  # the trainer's end was made for so many
            places = (init_info["world_size"] - init_info["rank_offset"]) // workers
            if len(ready) < places:
                return 0
            ready = ready[:places]
        if shared:
            self.forget_introductions()
            self._connected = ready

        async def one(number: int, engine: EngineHandle) -> None:
            info = self._numbered(init_info, number, len(ready))
            limit_s = self._config.refit.timeout_s
            answer = self._call(
                engine,
                lambda actor: actor.init_weight_transfer_engine.remote(info),
                doing="preparing a refit",
            )
            try:
                await asyncio.wait_for(answer, timeout=limit_s)
                engine.introduced = True
                return
            except EngineLost:
                pass
            except TimeoutError:
                self._lose(engine, f"took longer than refit.timeout_s={limit_s:g} s to prepare one")
            self._lose_connected(engine, ready)

        await asyncio.gather(*(one(*numbered) for numbered in enumerate(ready)))
        return len(ready)

    def forget_introductions(self) -> None:
        """No engine knows the trainer's sending end any more."""
        self._connected = []
        for engine in self.engines:
            engine.introduced = False

    def count_failed_meeting(self, reason: str) -> None:
        """Note that the trainer could not meet the engines; several times in a row end the run."""
        self._num_failed_meetings += 1
        log.warning("no engine was reached by a refit: %s", reason)
        if self._num_failed_meetings >= _MAX_FAILED_MEETINGS:
            self._lost_for_good = FleetLost(
                f"no refit in {_MAX_FAILED_MEETINGS} reached an engine: {reason}"
            )

    @property
    def _shared(self) -> bool:
        return self._config.refit.shares_communicator

    def _lose_connected(self, lost: EngineHandle, others: list[EngineHandle]) -> None:
        """Lose the others with `lost` if they cannot leave its communicators, which are vLLM's own;
        they do not count as restarts."""
        if self._shared and not self._config.refit.survives_interruption:
            for other in others:
                self._lose(other, f"shared a communicator with engine {lost.index}", counts=False)

    def _numbered(self, init_info: WireInfo, number: int, num: int) -> WireInfo:
        """`init_info` as sent to engine `number` of `num`."""
        workers, info = self._config.rollout.tensor_parallel, dict(init_info)
        if "num_workers" in info:
            info |= {"num_workers": num * workers, "engine_number": number}
        elif "rank_offset" in info:  # vLLM's nccl and nccl_m2n: the rank of its first worker
            info["rank_offset"] += number * workers
        return info

    async def start_update(self, version: int, *, only_stale: bool) -> None:
        """Begin to give `version` to the engines that are there: to all, or to those without the
        current weights."""
        self._target, self._only_stale, self._loss_counted = version, only_stale, False
        self._deadline = time.monotonic() + self._config.refit.timeout_s
        self._updating = [e for e in self.participants(only_stale=only_stale) if e.introduced]
        with span("start_update", track="refit", weight_version=version):
            await self._update(lambda actor: actor.start_weight_update.remote())

    async def load_bucket(self, update_info: WireInfo, number: int) -> None:
        """Have every engine that takes part load bucket `number` of the update."""
        with span("bucket", track="refit", number=number):
            await self._update(lambda actor: actor.update_weights.remote(update_info, number))

    async def _update(self, call: Callable[[EngineActor], Awaitable[None]]) -> None:
        """Make a step of the update on every engine that still takes part. An engine that fails it
        holds a mixture of weights and is replaced, one that was interrupted gets another chance."""

        async def one(engine: EngineHandle) -> None:
            limit_s = max(0.0, self._deadline - time.monotonic())
            answer = self._call(engine, call, doing="taking new weights")
            try:
                await asyncio.wait_for(answer, timeout=limit_s)
                return
            except EngineLost:
                pass
            except TimeoutError:
                limit_s = self._config.refit.timeout_s
                self._lose(engine, f"took longer than refit.timeout_s={limit_s:g} s for an update")
            except RolloutError as error:
                interrupted = isinstance(error, EngineInterrupted)
                if interrupted and not engine.interrupted:
                    log.warning("%s; it is sent everything again", error)
                    engine.interrupted, engine.introduced = True, False
                    engine.version = NO_WEIGHTS
                    return
                along = interrupted and self._loss_counted
                self._lose(engine, f"failed an update ({error})", counts=not along)
            self._loss_counted = True
            self._lose_connected(engine, self._updating)

        await asyncio.gather(*(one(engine) for engine in self._updating))
        if time.monotonic() >= self._deadline:  # the others waited with the one that was too late
            self._deadline = time.monotonic() + self._config.refit.timeout_s
        self._updating = [e for e in self._updating if e.introduced and not e.lost]

    async def finish_update(self) -> None:
        """End the update; from now on only engines with its version get work, which only those
        that took part have: where a run begins with other weights than model.path's, the version
        before is the same number."""
        with span("finish_update", track="refit"):
            await self._update(lambda actor: actor.finish_weight_update.remote())
        if not self._only_stale:
            for engine in self.engines:
                engine.version = NO_WEIGHTS
        for engine in self._updating:
            engine.version, engine.interrupted = self._target, False
            self._num_failed_meetings = 0
        self._updating, self._has_sent = [], True
        self.version = self._target
        self.notify()
