"""Weight updates as trainer rank 0 makes them: each call reaches every engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sfpo_megatron.config.rollout import Transport
from sfpo_megatron.rollout.calls import ControllerCalls
from sfpo_megatron.rollout.engine import WireInfo
from sfpo_megatron.rollout.errors import ControllerDied
from sfpo_megatron.rollout.handles import ControllerActor

T = TypeVar("T")


class WeightSyncClient:
    """vLLM's `VLLMWeightSyncClient` for all engines at once, through the controller.

    A controller that dies in mid-update does not end it: the sender goes through the rest, which
    reaches nobody; the controller that is started at its end wants the weights again.
    """

    def __init__(
        self,
        calls: ControllerCalls,
        transport: Transport,
        restart_controller: Callable[[str], None],
    ) -> None:
        """`transport`: `refit.transport` as the engines have it, never auto."""
        self._calls = calls
        self._restart_controller = restart_controller
        self.transport = transport
        self._version = 0
        self._only_stale = False
        self._num_buckets = 0
        self._lost: str | None = None
        """Why the controller died during this update."""

    def prepare(self, version: int, *, only_stale: bool) -> None:
        """Say what the next update gives, and whether only to engines without it."""
        self._version, self._only_stale, self._lost = version, only_stale, None

    def needs_introduction(self) -> bool:
        """Whether some engine does not know the trainer's sending end: a new one has to be made."""
        call = self._calls.controller.needs_introduction.remote(self._only_stale)
        try:
            return self._calls.wait(call, "preparing a refit")
        except ControllerDied as error:
            self._restart_controller(str(error))
            return True

    def init_weight_transfer_engine(self, init_info: WireInfo) -> int:
        """Introduce the sending end; the number of engines that know it now."""
        stale = self._only_stale
        return self._do(lambda c: c.init_weight_transfer_engine.remote(init_info, stale)) or 0

    def num_engines(self) -> int:
        """Number of engines that would take part; they may be fewer when the update begins."""
        return self._do(lambda c: c.num_participants.remote(self._only_stale)) or 0

    def skip_update(self, reason: str | None) -> None:
        """Go through an update in which no engine takes part: they are sent it again. `reason`: why
        the trainer could not meet engines that are there."""
        self._do(lambda c: c.forget_introductions.remote(reason))
        self.start_weight_update()
        self.finish_weight_update()

    def start_weight_update(self) -> None:
        """Begin the update."""
        self._num_buckets = 0
        self._do(lambda c: c.start_weight_update.remote(self._version, self._only_stale))

    def update_weights(self, update_info: WireInfo) -> None:
        """Have the engines take a bucket."""
        self.begin_bucket(update_info)()

    def begin_bucket(self, update_info: WireInfo) -> Callable[[], None]:
        """Begin `update_weights`, which the engines do after those before it, whether or not these
        have been waited for; the returned function waits for its end."""
        number, self._num_buckets = self._num_buckets, self._num_buckets + 1
        return self._begin(lambda c: c.update_weights.remote(update_info, number))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update."""
        self._do(lambda c: c.finish_weight_update.remote())
        self._calls.weight_version, self._calls.has_sent = self._version, True
        if self._lost is not None:
            self._restart_controller(self._lost)

    def _do(self, call: Callable[[ControllerActor], Awaitable[T]]) -> T | None:
        return self._begin(call)()

    def _begin(self, call: Callable[[ControllerActor], Awaitable[T]]) -> Callable[[], T | None]:
        """Begin a call; the returned function waits for its answer, None without a controller."""
        if self._lost is not None:
            return lambda: None
        pending = call(self._calls.controller)

        def wait() -> T | None:
            try:
                # No limit here: the controller keeps refit.timeout_s for each engine.
                return self._calls.wait(pending, "updating the engines' weights", timeout_s=None)
            except ControllerDied as error:
                self._lost = self._lost or str(error)
                return None

        return wait
