"""What trainer rank 0 holds: rollouts from the controller, whatever becomes of it meanwhile.

Every wait polls, so that Ctrl-C and SIGTERM are handled within a moment. A controller that dies or
answers nothing is restarted with its engines, and what was submitted is submitted again; seeds do
not depend on it.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from typing import NoReturn, TypeVar

import ray

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.calls import ControllerCalls, SpawnController
from sfpo_megatron.rollout.cluster import stop_cluster
from sfpo_megatron.rollout.engine import Memory
from sfpo_megatron.rollout.errors import (
    CannotBeUsed,
    ControllerDied,
    FleetLost,
    RolloutError,
)
from sfpo_megatron.rollout.handles import ControllerActor
from sfpo_megatron.rollout.lifeline import Lifeline
from sfpo_megatron.rollout.process_list import ProcessList, wait_until_gone
from sfpo_megatron.rollout.reports import FleetHealth, ScoredRequest
from sfpo_megatron.rollout.sampling import RolloutRequest
from sfpo_megatron.rollout.sync_client import WeightSyncClient
from sfpo_megatron.types import Rollout

T = TypeVar("T")
_START_S = 600.0
_MORE_TIME = " (rollout.timeout_s: raise it where they load for longer)"
_SHUTDOWN_S = 12.0
_LIST_S = 5.0

log = logging.getLogger(__name__)


class RolloutClient:
    """Rank 0's end of the rollouts."""

    def __init__(self, config: RunConfig, spawn: SpawnController, *, owns_cluster: bool) -> None:
        self._owns_cluster = owns_cluster
        self._max_restarts = config.rollout.max_restarts
        self._timeout_s = config.rollout.timeout_s
        self.processes = ProcessList()
        """What has to be gone at the end."""
        self._closed = False
        self._requests: dict[str, RolloutRequest] = {}
        self._asleep = False
        self._postponed: str | None = None
        """Why a controller has to be started once engines have their devices again."""
        self.num_controller_restarts = 0
        self._lost: FleetLost | None = None
        """Why there is no controller any more, and will be none."""
        # Ray's agents outlive a driver that is killed with SIGKILL. Without a thread here: the
        # cluster's processes are there when the engines are ready.
        self._lifeline = Lifeline(watch=False) if owns_cluster else None
        if self._lifeline is not None:
            self._lifeline.update_guard()
        self.calls = ControllerCalls(spawn, RunDirectory.of(config.output_dir))
        """Calls to the controller, which any part of rank 0 may make."""
        self.sync_client = WeightSyncClient(
            self.calls, config.refit.transport, self._restart_in_an_update
        )
        """The way of weight updates to all engines."""
        atexit.register(self.close)

    def polling(self, poll: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `poll` again and again while waits inside go on; what it raises ends the wait."""
        return self.calls.polling(poll)

    def wait_ready(self, timeout_s: float = _START_S) -> None:
        """Return when every engine can generate; raises what kept one from starting."""
        started = self.calls.starting
        self.calls.wait(started, "starting the engines", timeout_s=timeout_s, advice=_MORE_TIME)
        self.learn_processes()

    def submit(self, request: RolloutRequest) -> None:
        """Begin a request and return; the engines must be ready."""
        self._check_not_lost()
        died: ControllerDied | None = None
        try:
            self._submit(request, f"submitting request {request.id}")
        except ControllerDied as error:
            died = error
        self._requests[request.id] = request
        if died is not None:
            self.restart_controller(str(died))  # which submits it again with the others

    def _submit(self, request: RolloutRequest, doing: str) -> None:
        self.calls.wait(self.calls.controller.submit.remote(request), doing)

    def _check_not_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def collect(self, request_id: str, refit: Callable[[], None] | None = None) -> list[Rollout]:
        """`collect_scored`'s rollouts alone."""
        return self.collect_scored(request_id, refit).rollouts

    def collect_scored(
        self, request_id: str, refit: Callable[[], None] | None = None
    ) -> ScoredRequest:
        """Wait for a request: prompt after prompt, sample after sample, every rollout scored.

        `refit` sends the trainer's current weights again (`Refit.send(..., only_stale=True)`); it
        is called when engines were restarted and want them. Without it that is an error.
        """
        doing = f"collecting request {request_id}"
        while True:
            answer = self._persistently(lambda c: c.collect.remote(request_id), doing, request_id)
            if answer is not None:
                del self._requests[request_id]
                return answer
            if refit is None:
                raise RolloutError(f"request {request_id}: an engine lost its weights; send them")
            refit()

    def wait_generated(self, request_id: str) -> None:
        """Return when no engine works for a request any more: a refit may begin."""
        doing = f"waiting for the generation of request {request_id}"
        self._persistently(lambda c: c.wait_generated.remote(request_id), doing, request_id)

    def health(self) -> FleetHealth:
        """Which engines are alive; answers while they generate."""
        return self.calls.wait(
            self.calls.controller.health.remote(), "asking for the engines' health"
        )

    def check(self) -> None:
        """Raise `FleetLost` if engines were lost for good, with the reason."""
        self.calls.wait(self.calls.controller.check.remote(), "asking for the engines' health")

    def sleep(self) -> None:
        """Colocated engines give their devices to the trainer; what they knew is lost."""
        self._asleep = True
        self._hand_over(self.calls.controller.sleep.remote())

    def wake(self, memory: Memory) -> None:
        """Colocated engines take memory back: "weights", for a refit to fill, then "kv_cache"."""
        self._hand_over(self.calls.controller.wake.remote(memory))
        if memory == "kv_cache":
            self._asleep = False
            if self._postponed is not None:
                reason, self._postponed = self._postponed, None
                self.restart_controller(reason)

    def _hand_over(self, call: Awaitable[None]) -> None:
        """Wait without a limit: the controller keeps one for each engine."""
        try:
            self.calls.wait(call, "handing devices over", timeout_s=None)
        except ControllerDied as error:
            self.restart_controller(str(error))

    def _persistently(
        self, call: Callable[[ControllerActor], Awaitable[T]], doing: str, request_id: str
    ) -> T:
        """The answer to a long call, which a dead controller interrupts but does not end."""
        while True:
            self._check_not_lost()
            try:
                running = call(self.calls.controller)
                return self.calls.wait(running, doing, timeout_s=None, request_id=request_id)
            except ControllerDied as error:
                self.restart_controller(str(error))

    def restart_controller(self, reason: str) -> None:
        """Start another one with its engines, and submit again what was not collected. FleetLost,
        and no other error of the rollouts, where none comes up: what is trained can be saved."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            log.warning("%s", reason)
            old = self.processes.members
            self.calls.kill()
            wait_until_gone(old)
            if self._asleep:  # the trainer has the devices: no engine could start there
                self._postponed = reason
                return
            if self.num_controller_restarts >= self._max_restarts:
                limit = f"rollout.max_restarts={self._max_restarts}"
                self._give_up(f"{reason}; that is one more than {limit} allows")
            self.num_controller_restarts += 1
            self.calls.spawn()
            try:
                self.wait_ready(self._timeout_s)
                for request in self._requests.values():
                    self._submit(request, f"submitting request {request.id} again")
                return
            except CannotBeUsed as error:  # the run began with it: it has been changed since
                self._give_up(f"{reason}; the next did not start: {error}")
            except RolloutError as error:  # so too an engine: a device may not be free yet
                reason = str(error)
                if time.monotonic() > deadline:  # other ranks wait, and not for ever
                    limit = f"rollout.timeout_s={self._timeout_s:g} s"
                    self._give_up(f"{reason}; no engines came up within {limit}")
                with suppress(RolloutError):  # what is to be gone before the next starts
                    self.learn_processes()

    def _give_up(self, reason: str) -> NoReturn:
        self._lost = FleetLost(reason)
        raise self._lost

    def _restart_in_an_update(self, reason: str) -> None:
        """The same for rank 0 amid the other ranks, which an error here would leave waiting: that
        the engines are lost for good is raised by whatever asks for rollouts next."""
        with suppress(FleetLost):
            self.restart_controller(reason)

    def close(self) -> None:
        """End every process that this started; may be called again."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if ray.is_initialized():
            self._stop_actors()
            if self._owns_cluster:
                stop_cluster()
        self.processes.end()
        if self._lifeline is not None:
            self._lifeline.close()

    def _stop_actors(self) -> None:
        try:
            self.learn_processes()
            call = self.calls.controller.shutdown.remote()
            self.calls.wait(call, "shutting down", timeout_s=_SHUTDOWN_S)
        except RolloutError:
            pass  # a controller that is dead or stuck is killed below, with its engines
        self.calls.kill()

    def learn_processes(self) -> None:
        """Ask the controller for every process of its and its engines'."""
        if self._lifeline is not None:
            self._lifeline.update_guard()
        call = self.calls.controller.processes.remote()
        self.processes.learn(*self.calls.wait(call, "listing processes", timeout_s=_LIST_S))
