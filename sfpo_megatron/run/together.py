"""Rank 0 works with the engines; the other ranks wait, help when asked, and hear how it ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from sfpo_megatron.host.peers import watch_peers
from sfpo_megatron.outputs.stopping import OutOfTime
from sfpo_megatron.rollout.errors import FleetLost

T = TypeVar("T")
Work = Callable[[Callable[[], None]], T]
"""Given a function that asks all ranks to send the weights again."""


class Messages(Protocol):
    """The part of `mcore.control.ControlGroup` that is used here."""

    rank: int

    def broadcast_json(self, value: T | None = None) -> T: ...


class Together:
    """Engines that were restarted want the weights again, whose gathering takes all ranks."""

    def __init__(self, control: Messages) -> None:
        self._control = control

    def run(self, work: Work[T], resend: Callable[[], None] = lambda: None) -> T | None:
        """`work(ask)` on rank 0, whose result it returns there, None elsewhere. Each call of `ask`
        makes every rank call `resend`. Collective; FleetLost and OutOfTime are raised on every
        rank, outside of any collective."""
        control = self._control
        if control.rank == 0:

            def ask() -> None:
                control.broadcast_json({"do": "resend"})
                resend()

            try:
                result = work(ask)
            except tuple(_RAISED.values()) as error:
                name = next(n for n, kind in _RAISED.items() if isinstance(error, kind))
                control.broadcast_json({"do": "stop", "error": name, "reason": str(error)})
                raise
            control.broadcast_json({"do": "go on"})
            return result
        order: dict[str, str] = control.broadcast_json()
        while order["do"] == "resend":
            with suppress(FleetLost):  # rank 0 has it too, and says so once more
                resend()
            order = control.broadcast_json()
        if order["do"] == "stop":
            raise _RAISED[order["error"]](order["reason"])
        return None


class Introductions(Protocol):
    """The part of `mcore.control.ControlGroup` that the beginning of a run takes."""

    def all_gather_json(self, value: T) -> list[T]: ...


def begin_together(control: Introductions) -> None:
    """Have each rank watch the others of its host. Collective."""
    here = (socket.gethostname(), os.getpid())
    everyone = control.all_gather_json(here)
    watch_peers([pid for host, pid in everyone if host == here[0] and pid != here[1]])


class Meeting(Protocol):
    """The part of `mcore.control.ControlGroup` that the end of a run takes."""

    def barrier(self) -> None: ...


def end_together(control: Meeting) -> None:
    """Wait for rank 0, which verifies checkpoints, exports and draws when the others have nothing
    left to do: to its SIGTERM a rank that has ended is one that has failed. Collective."""
    watch_peers([])  # before the barrier, behind which they end at once
    control.barrier()


_RAISED: dict[str, type[Exception]] = {"fleet lost": FleetLost, "out of time": OutOfTime}
