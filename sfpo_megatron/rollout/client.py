"""What trainer rank 0 holds: calls to the controller that can be interrupted and that end.

Every wait polls, so that Ctrl-C and SIGTERM are handled within a moment. A controller that dies or
answers nothing is started anew with its engines, and what was submitted is submitted again; seeds
do not depend on it.
"""

from __future__ import annotations

import atexit
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from sfpo_megatron.config.rollout import Transport
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.processes import ProcessIdentity
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.cluster import ACTOR_GONE, stop_cluster, why_gone
from sfpo_megatron.rollout.engine import Memory
from sfpo_megatron.rollout.errors import ControllerDied, FleetLost, RolloutError
from sfpo_megatron.rollout.lifeline import ActorProcesses, Lifeline
from sfpo_megatron.rollout.reports import FleetHealth, ScoredRequest
from sfpo_megatron.rollout.sampling import RolloutRequest
from sfpo_megatron.types import Rollout

_POLL_S = 0.2
_CALL_S = 30.0  # calls that the controller answers at once
_PING_S = 10.0  # between questions whether it still answers, during long calls
_PING_ANSWER_S = 60.0
_START_S = 600.0
_SHUTDOWN_S = 12.0
_GONE_S = 5.0

log = logging.getLogger(__name__)


class RolloutClient:
    """Rank 0's end of the rollouts."""

    def __init__(self, config: RunConfig, spawn: Callable[..., Any], *, owns_cluster: bool) -> None:
        """`spawn(weight_version=v)` makes a controller whose engines want weights v."""
        self._spawn = spawn
        self._owns_cluster = owns_cluster
        self._max_restarts = config.rollout.max_restarts
        self._directory = RunDirectory.of(config.output_dir)
        self._processes: list[ActorProcesses] = []
        self._closed = False
        self._requests: dict[str, RolloutRequest] = {}
        self._weight_version = 0
        self._asleep = False
        self._postponed: str | None = None
        """Why a controller has to be started once engines have their devices again."""
        self.num_controller_restarts = 0
        self.sync_client = WeightSyncClient(self, config.refit.transport)
        """vLLM's `VLLMWeightSyncClient` for all engines at once."""
        self._on_poll: Callable[[], None] = _nothing
        # Ray's agents outlive a driver that is killed with SIGKILL. Without a thread here: the
        # cluster's processes are there when the engines are ready.
        self._lifeline = Lifeline(watch=False) if owns_cluster else None
        self._controller = spawn(weight_version=0)
        self._starting = self._controller.start.remote()
        atexit.register(self.close)

    @contextmanager
    def polling(self, poll: Callable[[], None]) -> Iterator[None]:
        """Call `poll` again and again while waits inside go on; what it raises ends the wait."""
        before, self._on_poll = self._on_poll, poll
        try:
            yield
        finally:
            self._on_poll = before

    def wait_ready(self, timeout_s: float = _START_S) -> None:
        """Return when every engine can generate; raises what kept one from starting."""
        self._wait(self._starting, timeout_s, "starting the engines")
        self._learn_processes()

    def submit(self, request: RolloutRequest) -> None:
        """Begin a request and return; the engines must be ready."""
        self._call("submit", request, doing=f"submitting request {request.id}")
        self._requests[request.id] = request

    def collect(self, request_id: str, refit: Callable[[], None] | None = None) -> list[Rollout]:
        """`collect_scored`'s rollouts alone."""
        return self.collect_scored(request_id, refit).rollouts

    def collect_scored(
        self, request_id: str, refit: Callable[[], None] | None = None
    ) -> ScoredRequest:
        """Wait for a request: prompt after prompt, sample after sample, every rollout scored.

        `refit` sends the trainer's current weights again (`Refit.send(..., resend=True)`); it is
        called when engines were started anew and want them. Without it that is an error.
        """
        while True:
            answer = self._persistently("collect", request_id, doing="collecting")
            if answer is not None:
                del self._requests[request_id]
                return answer
            if refit is None:
                raise RolloutError(f"request {request_id}: an engine lost its weights; send them")
            refit()

    def wait_generated(self, request_id: str) -> None:
        """Return when no engine works for a request any more: a refit may begin."""
        self._persistently("wait_generated", request_id, doing="waiting for the generation of")

    def health(self) -> FleetHealth:
        """Which engines are alive; answers while they generate."""
        return self._call("health", doing="asking for the engines' health")

    def check(self) -> None:
        """Raise `FleetLost` if engines were lost for good, with the reason."""
        self._call("check", doing="asking for the engines' health")

    def needs_introduction(self, *, only_stale: bool = False) -> bool:
        """An update needs a new sending end: some engine does not know the last one."""
        try:
            return self._call("needs_introduction", only_stale, doing="preparing a refit")
        except ControllerDied as error:
            self.restart_controller(str(error))
            return True

    def sleep(self) -> None:
        """Colocated engines give their devices to the trainer; what they knew is lost."""
        self._asleep = True
        self._tell("sleep")

    def wake(self, memory: Memory) -> None:
        """Colocated engines take memory back: "weights", for a refit to fill, then "kv_cache"."""
        self._tell("wake", memory)
        if memory == "kv_cache":
            self._asleep = False
            if self._postponed is not None:
                reason, self._postponed = self._postponed, None
                self.restart_controller(reason)

    def _tell(self, method: str, *args: Any) -> None:
        """No limit here: the controller keeps one for each engine."""
        try:
            call = getattr(self._controller, method).remote(*args)
            self._wait(call, None, "handing devices over")
        except ControllerDied as error:
            self.restart_controller(str(error))

    def _persistently(self, method: str, request_id: str, *, doing: str) -> Any:
        """A long call about a request, which a dead controller interrupts but does not end."""
        while True:
            try:
                call = getattr(self._controller, method).remote(request_id)
                return self._wait(call, None, f"{doing} request {request_id}")
            except ControllerDied as error:
                self.restart_controller(str(error))

    def restart_controller(self, reason: str) -> None:
        """Start another one with its engines, and submit again what was not collected."""
        log.warning("%s", reason)
        old = [member for actor in self._processes for member in actor.members]
        ray.kill(self._controller)  # its engines go with it, as Ray's children of a dead owner
        _wait_until_gone(old)
        if self._asleep:  # the trainer has the devices: no engine could start there
            self._postponed = reason
            return
        if self.num_controller_restarts >= self._max_restarts:
            raise FleetLost(
                f"{reason}; that is one more than rollout.max_restarts={self._max_restarts} allows"
            )
        self.num_controller_restarts += 1
        self._controller = self._spawn(weight_version=self._weight_version)
        self._starting = self._controller.start.remote()
        self.wait_ready()
        for request in self._requests.values():
            self._call("submit", request, doing=f"submitting request {request.id} again")

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
        members = [member for actor in self._processes for member in actor.members]
        guards = [actor.guard for actor in self._processes if actor.guard is not None]
        _wait_until_gone(members)
        for member in members:
            member.kill()
        _wait_until_gone(guards)
        if self._lifeline is not None:
            self._lifeline.close()

    def _stop_actors(self) -> None:
        try:
            self._learn_processes()
            self._wait(self._controller.shutdown.remote(), _SHUTDOWN_S, "shutting down")
        except RolloutError:
            pass  # a controller that is dead or stuck is killed below, with its engines
        ray.kill(self._controller)

    def _learn_processes(self) -> None:
        if self._lifeline is not None:
            self._lifeline.tell_news()
        host, found = self._call("processes", doing="listing processes", timeout_s=5.0)
        if host == socket.gethostname():
            gone = [
                actor
                for actor in self._processes
                if any(p.alive for p in (*actor.members, actor.guard) if p is not None)
            ]
            self._processes = [*(ActorProcesses(*actor) for actor in found), *gone]

    def _call(self, method: str, *args: Any, doing: str, timeout_s: float = _CALL_S) -> Any:
        return self._wait(getattr(self._controller, method).remote(*args), timeout_s, doing)

    def _wait(self, call: Any, timeout_s: float | None, doing: str) -> Any:
        """The answer. Without a limit, the controller is asked now and then whether it is there."""
        began = asked = time.monotonic()
        ping: Any = None
        while not ray.wait([call], timeout=_POLL_S)[0]:
            self._on_poll()
            now = time.monotonic()
            if timeout_s is not None and now > began + timeout_s:
                raise RolloutError(
                    f"no answer after {timeout_s:g} s {doing}; logs: {self._directory.logs}"
                )
            if timeout_s is None and ping is None and now > asked + _PING_S:
                ping, asked = self._controller.needs_introduction.remote(), now
            elif ping is not None and ray.wait([ping], timeout=0)[0]:
                ping = None
            elif ping is not None and now > asked + _PING_ANSWER_S:
                ray.kill(self._controller)
                raise ControllerDied(f"the rollout controller stopped answering while {doing}")
        try:
            return ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, RolloutError):
                raise type(error.cause)(str(error.cause)) from None
            raise RolloutError(
                f"the rollout controller failed while {doing}: {error.cause!r}; its log: "
                f"{self._directory.controller_log}"
            ) from error
        except ACTOR_GONE as error:
            raise ControllerDied(
                f"the rollout controller died while {doing} ({why_gone(error)}); its log: "
                f"{self._directory.controller_log}"
            ) from None


def _nothing() -> None:
    """No poll is set."""


def _wait_until_gone(processes: list[ProcessIdentity]) -> None:
    deadline = time.monotonic() + _GONE_S
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


class WeightSyncClient:
    """vLLM's `VLLMWeightSyncClient`: each call reaches every engine through the controller.
    `transport`: `refit.transport` as the engines have it, never auto.

    A controller that dies in mid-update does not end it: the sender goes through the rest, which
    reaches nobody; the controller that is started at its end wants the weights again.
    """

    def __init__(self, client: RolloutClient, transport: Transport) -> None:
        self._client = client
        self.transport = transport
        self._version = 0
        self._only_stale = False
        self._num_buckets = 0
        self._lost: str | None = None

    def needs_introduction(self) -> bool:
        """Some engine does not know the trainer's sending end: a new one has to be made."""
        return self._client.needs_introduction(only_stale=self._only_stale)

    def prepare(self, version: int, *, only_stale: bool) -> None:
        """What the next update will give, and whether only to engines without it."""
        self._version, self._only_stale, self._lost = version, only_stale, None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> int:
        """How many engines know now."""
        return self._update("init_weight_transfer_engine", init_info, self._only_stale) or 0

    def num_engines(self) -> int:
        """How many would take part in the update; they may be fewer when it begins."""
        return self._update("num_takers", self._only_stale) or 0

    def reach_nobody(self, reason: str | None) -> None:
        """Make the update one that no engine took part in: they are sent it again. `reason`: they
        are there, and still the trainer could not meet them."""
        self._update("forget_introductions", reason)
        self.start_weight_update()
        self.finish_weight_update()

    def start_weight_update(self) -> None:
        self._num_buckets = 0
        self._update("start_weight_update", self._version, self._only_stale)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.begin_bucket(update_info)()

    def begin_bucket(self, update_info: dict[str, Any]) -> Callable[[], None]:
        """`update_weights`, which the engines do after those before it, whether or not these have
        been waited for; the returned function waits for its end."""
        number, self._num_buckets = self._num_buckets, self._num_buckets + 1
        return self._begin("update_weights", update_info, number)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._update("finish_weight_update")
        self._client._weight_version = self._version
        if self._lost is not None:
            self._client.restart_controller(self._lost)

    def _update(self, method: str, *args: Any) -> Any:
        return self._begin(method, *args)()

    def _begin(self, method: str, *args: Any) -> Callable[[], Any]:
        if self._lost is not None:
            return lambda: None
        call = getattr(self._client._controller, method).remote(*args)

        def wait() -> Any:
            try:
                # No limit here: the controller keeps refit.timeout_s for each engine.
                return self._client._wait(call, None, "updating the engines' weights")
            except ControllerDied as error:
                self._lost = self._lost or str(error)
                return None

        return wait
