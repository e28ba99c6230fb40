"""How a rank's process ends: its exit code, and what it leaves for the launcher and for a reader.

Real ranks under torchrun: tests/dist/test_launcher.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, signal, sys
from sfpo_megatron.launcher.rank import run_rank
from sfpo_megatron.outputs.directory import RunDirectory

def run():
    match sys.argv[2]:
        case "leaves": sys.exit(0)
        case "leaves with text": sys.exit("no licence")
        case "signal": os.kill(os.getpid(), signal.SIGTERM)
        case "raises": raise KeyError("x")
    return False

sys.exit(run_rank(run, directory=RunDirectory.of(sys.argv[1]), launched=False))
"""


@pytest.mark.parametrize(
    ("what", "exit_code", "said"),
    [
        ("ends", 0, ""),
        ("raises", 1, "error: rank 0: KeyError: 'x'"),
        ("leaves", 1, "error: rank 0: SystemExit: 0"),
        ("leaves with text", 1, "error: rank 0: SystemExit: no licence"),
        ("signal", 128 + signal.SIGTERM, ""),
    ],
)
def test_only_a_run_that_returns_ends_with_0(
    tmp_path: Path, what: str, exit_code: int, said: str
) -> None:
    """A loss, a sink or a data source of a user's own may call `sys.exit`."""
    environ = os.environ | {"RANK": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RANK, str(tmp_path / "run"), what]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert ended.returncode == exit_code, ended.stderr
    assert ended.stderr.startswith(said)
    assert bool(ended.stderr) == bool(said)
    assert (tmp_path / "run/logs/rank_0.err").exists() == bool(said)
