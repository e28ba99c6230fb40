"""RAY_ADDRESS that cannot be joined: one message, at once, that names what is missing.

That a good one can be: tests/slurm. The advice was read off a real `ray start` with tokens, which
says "failed to connect" to all of them; tests/e2e/test_join_cluster.py starts one.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from sfpo_megatron.rollout.cluster import start_cluster
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.joining import what_is_missing, wrong_address


def test_nobody_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    begun = time.monotonic()
    with pytest.raises(RolloutError, match=f"RAY_ADDRESS: found 127.0.0.1:{port}, which cannot be"):
        start_cluster()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://head:10001", "head:6379 by default: Ray Client"),
        ("head", "head:6379 by default"),
        ("head:", "head:6379 by default"),
        ("head:port", "HOST:PORT of its head"),
    ],
)
def test_an_address_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, address: str, expected: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RolloutError, match=f"RAY_ADDRESS: found {address}, which") as raised:
        start_cluster()
    assert expected in str(raised.value)


def test_addresses_of_a_head() -> None:
    assert not any(map(wrong_address, ("auto", "head:6379", "10.0.0.1:26379", "[fe80::1]:6379")))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """In Ray's order: RAY_AUTH_MODE, a token, the right one."""
    home = {"HOME": str(tmp_path)}
    on = {"RAY_AUTH_MODE": "token"} | home
    assert what_is_missing(home).startswith("RAY_AUTH_MODE is not set here: if tokens are on there")
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file" in what_is_missing(home)
    assert what_is_missing(home | {"RAY_AUTH_MODE": "disabled"}).startswith(
        "RAY_AUTH_MODE=disabled"
    )
    assert "and there is no token here: set RAY_AUTH_TOKEN_PATH" in what_is_missing(on)
    assert "or unset RAY_AUTH_MODE" in what_is_missing(on)
    absent = what_is_missing(on | {"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    assert "and /nowhere holds none here" in absent
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("t")
    assert f"set RAY_AUTH_MODE=token; the token is taken from {token}" in what_is_missing(home)
    assert f"the token from {token} is not the cluster's" in what_is_missing(on)
    assert "the token from RAY_AUTH_TOKEN is not" in what_is_missing(on | {"RAY_AUTH_TOKEN": "x"})
