"""RAY_ADDRESS that cannot be joined: one message, at once. That a good one can: tests/slurm."""

from __future__ import annotations

import socket
import time

import pytest

from sfpo_megatron.rollout.cluster import start_cluster
from sfpo_megatron.rollout.errors import RolloutError


def test_nobody_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    begun = time.monotonic()
    with pytest.raises(RolloutError, match=f"RAY_ADDRESS: found 127.0.0.1:{port}, which cannot be"):
        start_cluster()
    assert time.monotonic() - begun < 10
