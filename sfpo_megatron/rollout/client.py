"""What trainer rank 0 holds: calls to the controller that can be interrupted and that end.

Every wait polls, so that Ctrl-C and SIGTERM are handled within a moment and a dead controller ends
the run with one message.
"""

from __future__ import annotations

import atexit
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from sfpo_megatron.rollout.cluster import ACTOR_GONE, stop_cluster, why_gone
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.lifeline import ActorProcesses, Lifeline, ProcessIdentity
from sfpo_megatron.rollout.reports import FleetHealth, RolloutTimes
from sfpo_megatron.rollout.sampling import RolloutRequest
from sfpo_megatron.types import Rollout

_POLL_S = 0.2
_CALL_S = 30.0  # calls that the controller answers at once
_SLACK_S = 30.0  # on top of a limit that the controller keeps itself
_SHUTDOWN_S = 12.0
_GONE_S = 5.0


class RolloutClient:
    """Rank 0's end of the rollouts."""

    def __init__(
        self, controller: Any, *, owns_cluster: bool, log_dir: Path, request_timeout_s: float
    ) -> None:
        self._controller = controller
        self._owns_cluster = owns_cluster
        self._request_timeout_s = request_timeout_s
        self._log_dir = log_dir
        self._processes: list[ActorProcesses] = []
        self._closed = False
        self.last_times = RolloutTimes(generate_s=0.0, reward_s=0.0)
        """Where the time of the request collected last went."""
        self.sync_client = WeightSyncClient(self)
        """vLLM's `VLLMWeightSyncClient` for all engines at once."""
        self.on_poll: Callable[[], None] | None = None
        """Called while a wait polls; what it raises ends the wait."""
        # Ray's agents outlive a driver that is killed with SIGKILL. Without a thread here: the
        # cluster's processes are there when the engines are ready.
        self._lifeline = Lifeline(watch=False) if owns_cluster else None
        self._starting = controller.start.remote()
        atexit.register(self.close)

    def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Return when every engine can generate; raises what kept one from starting."""
        self._wait(self._starting, timeout_s, "starting the engines")
        self._learn_processes()

    def submit(self, request: RolloutRequest) -> None:
        """Begin a request and return; the engines must be ready."""
        self._call("submit", request, doing=f"submitting request {request.id}")

    def collect(self, request_id: str) -> list[Rollout]:
        """Wait for a request: prompt after prompt, sample after sample, every rollout scored.

        The controller ends a request that takes longer than rollout.timeout_s.
        """
        limit_s = self._request_timeout_s + _SLACK_S
        call = self._controller.collect.remote(request_id)
        answer = self._wait(call, limit_s, f"collecting request {request_id}")
        self.last_times = answer.times
        return answer.rollouts

    def health(self) -> FleetHealth:
        """Which engines are alive; answers while they generate."""
        return self._call("health", doing="asking for the engines' health")

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
            self._processes = [ActorProcesses(*actor) for actor in found]

    def _call(self, method: str, *args: Any, doing: str, timeout_s: float = _CALL_S) -> Any:
        return self._wait(getattr(self._controller, method).remote(*args), timeout_s, doing)

    def _wait(self, call: Any, timeout_s: float | None, doing: str) -> Any:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not ray.wait([call], timeout=_POLL_S)[0]:
            if self.on_poll is not None:
                self.on_poll()
            if deadline is not None and time.monotonic() > deadline:
                raise RolloutError(
                    f"no answer after {timeout_s:g} s {doing}; logs: {self._log_dir}"
                )
        try:
            return ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, RolloutError):
                raise RolloutError(str(error.cause)) from None
            raise RolloutError(
                f"the rollout controller failed while {doing}: {error.cause!r}; its log: "
                f"{self._log_dir / 'controller.log'}"
            ) from error
        except ACTOR_GONE as error:
            raise RolloutError(
                f"the rollout controller died while {doing} ({why_gone(error)}); its log: "
                f"{self._log_dir / 'controller.log'}"
            ) from None


def _wait_until_gone(processes: list[ProcessIdentity]) -> None:
    deadline = time.monotonic() + _GONE_S
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


class WeightSyncClient:
    """vLLM's `VLLMWeightSyncClient`: each call reaches every engine through the controller."""

    def __init__(self, client: RolloutClient) -> None:
        self._client = client

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._update("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._update("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._update("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._update("finish_weight_update", weight_version)

    def _update(self, method: str, *args: Any) -> None:
        # No limit: a large bucket on a slow machine takes what it takes; a dead engine is noticed.
        call = getattr(self._client._controller, method).remote(*args)
        self._client._wait(call, None, "updating the engines' weights")
