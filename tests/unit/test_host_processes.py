"""Processes read from /proc, against psutil and the kernel; the other ranks when they end."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from sfpo_megatron.host import peers
from sfpo_megatron.host.peers import PeerLostError, PeerWriteError, is_peers
from sfpo_megatron.host.processes import ProcessIdentity, descendants, is_alive


def test_identity_and_descendants_are_those_that_psutil_finds() -> None:
    """A child whose name has blanks and parentheses, and its own child."""
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    child = subprocess.Popen(["(a b) c", "-c", code], executable=sys.executable)
    try:
        process = psutil.Process(child.pid)
        while not process.children():
            assert child.poll() is None
        ours = psutil.Process().children(recursive=True)
        assert {p.pid for p in ours} >= {child.pid, process.children()[0].pid}
        living = [p.pid for p in ours if p.status() != psutil.STATUS_ZOMBIE]  # of other tests
        assert sorted(descendants(os.getpid())) == sorted(living)
        identity = ProcessIdentity.of(child.pid)
        assert identity is not None and identity.alive
        ticks = os.sysconf("SC_CLK_TCK")
        created = identity.start_ticks / ticks + psutil.boot_time()
        assert abs(created - process.create_time()) < 1.5
        later = ProcessIdentity(child.pid, identity.start_ticks + 1)
        assert not later.alive, "another process with the same pid"
        later.kill()
        assert is_alive(child.pid)
    finally:
        for member in psutil.Process(child.pid).children():
            member.kill()
        child.kill()
        child.wait()
    assert not is_alive(child.pid) and ProcessIdentity.of(child.pid) is None


def test_a_peer_that_ended_is_noticed_even_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        peers.watch_peers([os.getpid(), child.pid])
        assert peers.lost_peer() is None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
        assert peers.lost_peer() == child.pid
    finally:
        child.kill()
        child.wait()
        peers.watch_peers([])


def raised_from(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except type(error) as raised:
        return raised


GLOO = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5333"


class OwnError(RuntimeError):
    """An error of our own, whose text may quote Ray or a download."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PeerLostError("rank 0 lost a peer"), True),
        (raised_from(OwnError("checkpoint of step 3"), PeerWriteError("another rank")), True),
        (raised_from(raised_from(OwnError("a"), OwnError("b")), RuntimeError("c")), False),
        (RuntimeError(GLOO), True),
        (raised_from(OwnError("pass"), RuntimeError("Connection reset by peer")), True),
        (OwnError(GLOO), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (RuntimeError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_follows_from_another_rank(error: Exception, expected: bool) -> None:
    assert is_peers(error) is expected
