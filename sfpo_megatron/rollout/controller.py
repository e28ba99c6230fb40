"""The RolloutController: one CPU-only actor between trainer rank 0 and all engines.

It owns dispatch, scoring, refill, refit order and (by its fleet) the engines' lives, so that no
Python thread of a trainer rank does. Async, so it answers while it generates.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from sfpo_megatron.config.paths import absolute_model, with_absolute_paths
from sfpo_megatron.config.rules.transports import chosen, transports
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import WrongInput, may_pass
from sfpo_megatron.host.spans import span
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.trace import record_spans
from sfpo_megatron.rollout.actor_variables import enter_actor
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.cluster import create_actor, nodes, start_cluster
from sfpo_megatron.rollout.engine import Engine, Memory, WireInfo
from sfpo_megatron.rollout.episode_runner import EpisodeRunner
from sfpo_megatron.rollout.episodes import check_environment
from sfpo_megatron.rollout.errors import CannotBeUsed, RolloutError
from sfpo_megatron.rollout.handles import EngineActor
from sfpo_megatron.rollout.lifeline import ActorProcesses, Lifeline
from sfpo_megatron.rollout.placement import Placement, RankDevice, place_engines
from sfpo_megatron.rollout.reports import (
    FleetHealth,
    FleetProgress,
    RolloutCount,
    ScoredRequest,
)
from sfpo_megatron.rollout.rounds import Rounds
from sfpo_megatron.rollout.sampling import RolloutRequest, check_lengths
from sfpo_megatron.rollout.scoring import Scorer
from sfpo_megatron.rollout.slots import SpawnEngine
from sfpo_megatron.rollout.updates import UpdatableFleet


def start_rollouts(
    config: RunConfig, *, model_path: str, trainer: Sequence[RankDevice] = ()
) -> RolloutClient:
    """Start the controller and its engines; returns while they load (`client.wait_ready`).

    `trainer`: the device of each trainer rank, which dedicated engines leave alone and colocated
    ones share; empty on CPU.
    """
    check_environment(config)  # before an engine starts
    # Actors on a cluster that RAY_ADDRESS names run in another directory.
    config, model_path = with_absolute_paths(config), absolute_model(model_path)
    with span("cluster"):
        owns_cluster = start_cluster()
    cluster = nodes(is_ours=owns_cluster)
    rollout = config.rollout
    known: list[RankDevice] | None = list(trainer)
    if owns_cluster:  # this host alone, by whatever name Ray knows it
        here, name = socket.gethostname(), cluster[0].address
        known = [replace(r, address=name) if r.address == here else r for r in trainer]
    elif rollout.placement == "dedicated":  # RAY_ADDRESS: Ray was started on the engines' devices
        known = None
    placements = place_engines(
        cluster,
        known,
        num_engines=rollout.num_engines,
        tensor_parallel=rollout.tensor_parallel,
        placement=rollout.placement,
    )
    config = _with_chosen_transport(config, placements, own_node=cluster[0].id)
    spawn = partial(
        create_actor,
        RolloutController,
        config,
        model_path=model_path,
        placements=placements,
        placement=Placement(node_id=cluster[0].id, devices=()),  # beside rank 0
        role="controller",
    )
    return RolloutClient(config, spawn, owns_cluster=owns_cluster)


def _with_chosen_transport(
    config: RunConfig, placements: Sequence[Placement], *, own_node: str
) -> RunConfig:
    """`config` with the transport that engines in these places can have."""
    one_node = all(placement.node_id == own_node for placement in placements)
    on_cpu = not any(placement.devices or placement.num_gpus for placement in placements)
    config = chosen(config, one_node=one_node, on_cpu=on_cpu)
    if config.refit.transport == "shm" and not one_node:
        raise RolloutError(
            "refit.transport: found shm with engines on other nodes than the trainer's rank 0, "
            "expected one that leaves the node; set it to auto"
        )
    for problem in transports(config):  # of what auto stands for here
        raise RolloutError(f"{problem.key}: {problem.message}")
    return config


def _spawner(
    engine_class: type, config: RunConfig, model_path: str, placements: Sequence[Placement]
) -> SpawnEngine:
    """What starts an engine by its index; again where one of that index was started before."""
    started: set[int] = set()

    def spawn(index: int) -> EngineActor:
        is_restart = index in started
        started.add(index)
        return create_actor(
            engine_class,
            config,
            model_path=model_path,
            log_file=RunDirectory.of(config.output_dir).engine_log(index),
            placement=placements[index],
            is_restart=is_restart,
        )

    return spawn


class RolloutController:
    """Dispatch, scoring, refits and the engines' lives, behind asynchronous calls."""

    engine_class: type = Engine
    _rounds: Rounds

    def __init__(
        self,
        config: RunConfig,
        *,
        model_path: str,
        placements: Sequence[Placement],
        weight_version: int = 0,
        has_sent: bool = False,
    ) -> None:
        directory = RunDirectory.of(config.output_dir)
        enter_actor(directory.controller_log)
        record_spans(directory, "controller")
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
        self._lifeline = Lifeline()
        self._config = config
        spawn = _spawner(self.engine_class, config, model_path, placements)
        self._fleet = UpdatableFleet(config, spawn, version=weight_version, has_sent=has_sent)
        self._scorer = Scorer(config, model_path)
        self._open = ExitStack()
        self._requests: dict[str, asyncio.Task[ScoredRequest]] = {}
        self._counts: dict[str, RolloutCount] = {}
        """Request -> how far it has come, until it is collected."""
        self._updating = False

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Return when every engine can generate and the scoring pool runs."""
        await asyncio.gather(self._fleet.start(), self._prepare())

    async def _prepare(self) -> None:
        try:
            await self._scorer.start()
            # In a thread: a user's environment may take its time.
            runner = await asyncio.to_thread(
                EpisodeRunner, self._config, self._scorer.tokenizer, self._fleet
            )
        except WrongInput as error:
            kind = RolloutError if may_pass(error) else CannotBeUsed
            raise kind(str(error)) from None
        self._open.callback(runner.close)
        self._rounds = Rounds(self._config.seed, runner, self._scorer)

    async def health(self) -> FleetHealth:
        """Answers at once, also while generating; an engine that does not, or is only starting, is
        not alive."""
        engines = list(self._fleet.engines)
        alive = await asyncio.gather(*(self._fleet.alive(engine) for engine in engines))
        return FleetHealth(
            engines_alive=tuple(
                engine.ready and state is True for engine, state in zip(engines, alive, strict=True)
            ),
            num_unfinished_requests=sum(not task.done() for task in self._requests.values()),
            weight_version=self._fleet.version,
            num_restarts=self._fleet.num_restarts,
        )

    async def progress(self, request_id: str) -> FleetProgress:
        """How far a request has come, and what engines that are starting are at."""
        count = self._counts.get(request_id) or RolloutCount()
        return FleetProgress(count=count, starting=self._fleet.starting)

    async def check(self) -> None:
        """Raise if engines were lost for good."""
        self._fleet.check()

    async def processes(self) -> tuple[str, list[ActorProcesses]]:
        """Host name, and every process of ours (engines on other hosts have their guards there)."""
        return socket.gethostname(), [self._lifeline.processes(), *await self._fleet.processes()]

    async def shutdown(self) -> None:
        """End engines and scoring processes in good order; the guards catch what is left."""
        for task in self._requests.values():
            task.cancel()
        await self._fleet.shutdown()
        await asyncio.to_thread(self._open.close)
        await self._scorer.close()

    # --- rollouts -----------------------------------------------------------------------------

    async def submit(self, request: RolloutRequest) -> None:
        """Begin a request; `collect` gives its rollouts."""
        self._fleet.check()
        if self._updating:
            raise RolloutError(f"request {request.id}: refused, a refit is under way")
        if request.id in self._requests:
            raise RolloutError(f"request {request.id}: already submitted and not collected")
        check_lengths(request, self._config)
        self._requests[request.id] = asyncio.create_task(self._run(request))

    async def collect(self, request_id: str) -> ScoredRequest | None:
        """The request's rollouts: prompt after prompt, sample after sample, each scored. None: an
        engine that was restarted wants the current weights first; send them and ask again."""
        task = self._request(request_id)
        while not task.done():
            self._fleet.check()
            if self._fleet.wants_weights:
                return None
            await self._any_of(task)
        del self._requests[request_id]
        self._counts.pop(request_id, None)
        return await task

    async def wait_generated(self, request_id: str) -> None:
        """Return when the request needs no engine any more, or when none can go on with it: then
        the next refit may begin."""
        task = self._request(request_id)
        while not task.done() and self._fleet.can_generate:
            await self._any_of(task)

    async def _any_of(self, task: asyncio.Task[Any]) -> None:
        change = asyncio.ensure_future(self._fleet.change())
        await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()

    def _request(self, request_id: str) -> asyncio.Task[ScoredRequest]:
        if request_id not in self._requests:
            raise RolloutError(f"request {request_id}: never submitted, or already collected")
        return self._requests[request_id]

    async def _run(self, request: RolloutRequest) -> ScoredRequest:
        count = self._counts[request.id] = RolloutCount()
        with span("rollouts", track="requests", id=request.id):
            selection, times = await self._rounds.until_full(request, count)
            rollouts, counts = selection.result()
            return ScoredRequest(
                rollouts=rollouts,
                counts=counts,
                load=await self._fleet.take_load(),
                outcomes=selection.outcomes,
                times=times,
                num_reissued=self._fleet.num_reissued,
                num_restarts=self._fleet.num_restarts,
            )

    # --- devices that are shared with the trainer ---------------------------------------------

    async def sleep(self) -> None:
        """The devices are the trainer's when this returns."""
        await self._fleet.sleep()

    async def wake(self, memory: Memory) -> None:
        """The engines' devices are theirs again."""
        await self._fleet.wake(memory)

    # --- refit --------------------------------------------------------------------------------

    async def needs_introduction(self, only_stale: bool) -> bool:
        """Whether an update needs a new sending end of the trainer."""
        return self._fleet.needs_introduction(only_stale=only_stale)

    async def num_participants(self, only_stale: bool) -> int:
        """Number of engines that would take part in an update."""
        return len(self._fleet.participants(only_stale=only_stale))

    async def forget_introductions(self, reason: str | None) -> None:
        """No engine knows the trainer's sending end; `reason`: the trainer could not meet them."""
        self._fleet.forget_introductions()
        if reason is not None:
            self._fleet.count_failed_meeting(reason)

    async def init_weight_transfer_engine(self, init_info: WireInfo, only_stale: bool) -> int:
        """Introduce the trainer's sending end to the engines; how many."""
        return await self._fleet.introduce(init_info, only_stale=only_stale)

    async def start_weight_update(self, version: int, only_stale: bool) -> None:
        """Pause the engines that take part and begin; refused while they generate. `only_stale`:
        the current weights again, for engines that were restarted."""
        unfinished = [name for name, task in self._requests.items() if not task.done()]
        if not only_stale and unfinished and self._fleet.can_generate:
            raise RolloutError(
                f"refit refused: request {min(unfinished)} is still generating; collect it "
                "first (a rollout has one weight version)"
            )
        self._updating = True
        await self._fleet.start_update(version, only_stale=only_stale)

    async def update_weights(self, update_info: WireInfo, number: int) -> None:
        """Hand bucket `number` of the update to every engine that takes part."""
        await self._fleet.load_bucket(update_info, number)

    async def finish_weight_update(self) -> None:
        """End the update everywhere; rollouts generated from now on carry the new version."""
        await self._fleet.finish_update()
        self._updating = False
