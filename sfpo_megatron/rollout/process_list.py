"""Every process that rank 0 has started, so that none is left behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

from sfpo_megatron.host.processes import ProcessIdentity, tidies_up
from sfpo_megatron.rollout.lifeline import ActorProcesses

_GONE_S = 5.0


class ProcessList:
    """Processes of the controller and its engines on this host; on others their guards do it."""

    def __init__(self) -> None:
        self.actors: list[ActorProcesses] = []
        """The controller first, then the engines, then what is left of earlier ones."""

    def learn(self, host: str, found: Iterable[ActorProcesses]) -> None:
        """Take in what the controller found, and keep what else is alive."""
        if host == socket.gethostname():
            left = [
                actor
                for actor in self.actors
                if any(p.alive for p in (*actor.members, actor.guard) if p is not None)
            ]
            self.actors = [*(ActorProcesses(*actor) for actor in found), *left]

    @property
    def members(self) -> list[ProcessIdentity]:
        """All processes but for the guards."""
        return [member for actor in self.actors for member in actor.members]

    def end(self) -> None:
        """Wait for the end of all, kill what is left, then wait for the guards, which tidy up."""
        members = self.members
        wait_until_gone(members)
        keepers = [member for member in members if tidies_up(member.pid)]
        for member in members:
            if member not in keepers:
                member.kill()
        # Python's keepers of shared memory end by themselves, once they have removed it.
        wait_until_gone(keepers)
        for keeper in keepers:
            keeper.kill()
        wait_until_gone([actor.guard for actor in self.actors if actor.guard is not None])


def wait_until_gone(processes: list[ProcessIdentity]) -> None:
    """Wait for the end of `processes`, for a few seconds at most."""
    deadline = time.monotonic() + _GONE_S
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
