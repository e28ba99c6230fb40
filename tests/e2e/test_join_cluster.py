"""A plain `ray start` of somebody else, with tokens, on loopback. `make test-full`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.full

JOIN = """
from sfpo_megatron.rollout.cluster import start_cluster
from sfpo_megatron.rollout.errors import RolloutError
try:
    print("joined", start_cluster())
except RolloutError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, Path]]:
    """Address and token file of a head whose tokens are on."""
    folder = Path(tempfile.mkdtemp(prefix="sfpo-", dir="/tmp"))  # Ray's sockets want a short path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}"),
        *("--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--temp-dir={folder}"),
        "--object-store-memory=100000000",
    ]
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(folder)}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=120
    )
    try:
        assert done.returncode == 0, done.stderr
        yield f"127.0.0.1:{port}", token
    finally:
        ours = [p for p in psutil.process_iter(["cmdline"]) if f"{folder}/" in _command(p)]
        for process in ours:
            process.kill()
        psutil.wait_procs(ours, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def _command(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def join(address: str, home: Path, **variables: str) -> str:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        env=environment | {"RAY_ADDRESS": address, "HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_advice_is_followed_to_the_end(head: tuple[str, Path], tmp_path: Path) -> None:
    """Each line names the next thing that is missing; after the last one we are in."""
    address, token = head
    said = join(address, tmp_path)
    assert "RAY_AUTH_MODE is not set here: if tokens are on there, set RAY_AUTH_MODE=token" in said
    said = join(address, tmp_path, RAY_AUTH_MODE="token")
    assert "RAY_AUTH_MODE=token and there is no token here: set RAY_AUTH_TOKEN_PATH" in said
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    said = join(address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert f"the token from {wrong} is not the cluster's" in said
    said = join(address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    assert said == "joined False"
