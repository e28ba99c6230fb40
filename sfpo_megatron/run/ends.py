"""What rank 0 alone holds of a run, and the null objects that the other ranks hold instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.peers import PeerLostError, lost_peer
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.stopping import NoStop, Stopping, StopWatch
from sfpo_megatron.outputs.trace import NoTrace, Trace
from sfpo_megatron.resharding.seams import EngineClient
from sfpo_megatron.run.feed import Feed
from sfpo_megatron.run.held_out import Best, Evaluation
from sfpo_megatron.run.saved_rollouts import Saver
from sfpo_megatron.tracking.tracker import NoTracker, Tracker

if TYPE_CHECKING:
    from sfpo_megatron.rollout.engine import Memory


class Fleet(Protocol):
    """All engines at once, as rank 0 starts, pauses and ends them (`rollout.client`)."""

    @property
    def sync_client(self) -> EngineClient | None: ...
    def wait_ready(self, timeout_s: float) -> None: ...
    def polling(self, poll: Callable[[], None]) -> AbstractContextManager[None]: ...
    def sleep(self) -> None: ...
    def wake(self, memory: Memory) -> None: ...
    def close(self) -> None: ...


class NoFleet:
    """There are no engines here: another rank than 0, or a run on saved rollouts."""

    sync_client = None

    def wait_ready(self, timeout_s: float) -> None:
        """Nothing starts."""

    def polling(self, poll: Callable[[], None]) -> AbstractContextManager[None]:
        """Nothing is waited for."""
        return nullcontext()

    def sleep(self) -> None:
        """There is nothing to put to sleep."""

    def wake(self, memory: Memory) -> None:
        """There is nothing to wake."""

    def close(self) -> None:
        """There is nothing to end."""


class WeightSender(Protocol):
    """The trainer's end of refits (`resharding.refit.Refit`)."""

    def send(self, weight_version: int, *, only_stale: bool = False) -> int: ...
    def close(self) -> None: ...


class NoRefit:
    """A run on saved rollouts has nobody to send weights to."""

    def send(self, weight_version: int, *, only_stale: bool = False) -> int:
        """Send nothing."""
        return 0

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(kw_only=True, frozen=True, slots=True)
class MainEnds:
    """What rank 0 alone holds of a run; null objects on the other ranks."""

    stop: Stopping
    tracker: Tracker | NoTracker
    fleet: Fleet
    feed: Feed
    saver: Saver
    evaluation: Evaluation
    best: Best = field(default_factory=Best)
    trace: Trace | NoTrace = field(default_factory=NoTrace)

    def polling(self) -> AbstractContextManager[None]:
        """Look for requests to stop while rank 0 waits for engines inside: only where no collective
        is under way."""
        return self.fleet.polling(self._poll)

    def _poll(self) -> None:
        if self.stop.reason is not None:
            if (pid := lost_peer()) is not None:
                raise PeerLostError(f"another rank (pid {pid}) is gone; its own message says why")
            self.stop.check()


def stop_watch(config: RunConfig) -> Stopping:
    """Who looks for requests to stop, on rank 0."""
    if not config.saves_state:
        return NoStop()
    return StopWatch(
        RunDirectory.of(config.output_dir),
        must_save_within_s=config.checkpoint.must_save_within_s,
        stop_before_walltime_s=config.checkpoint.stop_before_walltime_s,
    )
