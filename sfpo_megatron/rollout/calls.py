"""Calls to the controller: waits that can be interrupted and that end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from sfpo_megatron.host import progress
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.cluster import ACTOR_GONE, why_gone
from sfpo_megatron.rollout.errors import ControllerDied, RolloutError
from sfpo_megatron.rollout.handles import ControllerActor
from sfpo_megatron.rollout.reports import FleetProgress

T = TypeVar("T")
_POLL_S = 0.2
_CALL_S = 30.0  # calls that the controller answers at once
_PING_S = 10.0  # between questions how far it is, and so whether it still answers
_WATCHED_S = 0.5  # the same where somebody is shown the answers
_PING_ANSWER_S = 60.0


class SpawnController(Protocol):
    """Starts a controller whose engines want weights of this version, which are those of
    model.path only until some have been sent."""

    def __call__(self, *, weight_version: int, has_sent: bool) -> ControllerActor: ...


class ControllerCalls:
    """The controller that there is now, shared by all who call it."""

    def __init__(self, spawn: SpawnController, directory: RunDirectory) -> None:
        self._spawn = spawn
        self._directory = directory
        self._on_poll: Callable[[], None] = _nothing
        self.weight_version = 0
        """Version of the weights that the engines of another controller have to hold."""
        self.has_sent = False
        """Whether the trainer has sent them: version 0 may be other weights than model.path's."""
        self.spawn()

    def spawn(self) -> None:
        """Start a controller, which begins to start its engines."""
        self.controller = self._spawn(weight_version=self.weight_version, has_sent=self.has_sent)
        self.starting = self.controller.start.remote()

    def kill(self) -> None:
        """End the controller; its engines go with it, as Ray's children of a dead owner."""
        ray.kill(self.controller)

    @contextmanager
    def polling(self, poll: Callable[[], None]) -> Iterator[None]:
        """Call `poll` again and again while waits inside go on; what it raises ends the wait."""
        before, self._on_poll = self._on_poll, poll
        try:
            yield
        finally:
            self._on_poll = before

    def wait(
        self,
        call: Awaitable[T],
        doing: str,
        *,
        timeout_s: float | None = _CALL_S,
        advice: str = "",
        request_id: str = "",
    ) -> T:
        """The answer to `call`; `advice`: what to do if it takes too long. The controller is asked
        now and then how far it is, with request `request_id` if the call is about one; without a
        limit, it has to answer that."""
        began = asked = time.monotonic()
        ping: Awaitable[FleetProgress] | None = None
        while not ray.wait([call], timeout=_POLL_S)[0]:
            self._on_poll()
            now = time.monotonic()
            if timeout_s is not None and now > began + timeout_s:
                too_long = f"no answer after {timeout_s:g} s {doing}{advice}"
                raise RolloutError(f"{too_long}; logs: {self._directory.logs}")
            if ping is None and now > asked + (_WATCHED_S if progress.is_observed() else _PING_S):
                ping, asked = self.controller.progress.remote(request_id), now
            elif ping is not None and ray.wait([ping], timeout=0)[0]:
                _report(ping)
                ping = None
            elif ping is not None and timeout_s is None and now > asked + _PING_ANSWER_S:
                self.kill()
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


def _report(answer: Awaitable[FleetProgress]) -> None:
    try:
        found: FleetProgress = ray.get(answer)
    except RayError:  # the call that is waited for says what happened
        return
    progress.note(found.note)
    if found.count.num_asked:
        progress.advance("rollouts", found.count.num_done, found.count.num_asked)


def _nothing() -> None:
    """No poll is set."""
