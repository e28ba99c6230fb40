"""The other ranks of a run, when they are gone: who notices, and the errors that are theirs.

Standard library only: the launcher tells the first failure of a run from those that follow it.
"""

from __future__ import annotations

from sfpo_megatron.host.processes import is_alive

# gloo's words for a connection that another rank has left. Megatron's own collectives raise them
# as a bare RuntimeError of torch.
_GLOO_LOST = ("Connection closed by peer", "Connection reset by peer")


class PeerError(RuntimeError):
    """Another rank has failed, whose own message says why."""


class PeerLostError(PeerError):
    """Another rank is gone."""


class PeerWriteError(PeerError):
    """Another rank could not write its part of a checkpoint."""


def is_peers(error: BaseException) -> bool:
    """Whether `error` follows from another rank's: it, or what it was raised from, is a `PeerError`
    or torch's report of a lost connection."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, PeerError) or _is_gloo_lost(link):
            return True
        link = link.__cause__
    return False


def _is_gloo_lost(error: BaseException) -> bool:
    """The one place that reads gloo's text; an error class of ours may quote it and mean Ray."""
    kind = type(error)
    by_torch = kind is RuntimeError or kind.__module__.partition(".")[0] == "torch"
    return by_torch and any(sign in str(error) for sign in _GLOO_LOST)


# ---- noticing ----------------------------------------------------------------------------------

_peers: list[int] = []


def watch_peers(pids: list[int]) -> None:
    """Watch the other ranks on this machine. torchrun sends SIGTERM both when it is asked to stop
    and when a rank has failed; which of the two it was shows in whether they are all alive."""
    _peers[:] = pids


def lost_peer() -> int | None:
    """The pid of a rank that has ended, or None."""
    return next((pid for pid in _peers if not is_alive(pid)), None)
