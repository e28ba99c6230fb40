"""A process that holds a run's directory, for the tests of its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
from sfpo_megatron.outputs import heartbeat
from sfpo_megatron.outputs.lock import RunLock
from sfpo_megatron.outputs.directory import RunDirectory

folder, run, how = sys.argv[1:]
if how == "beat":
    def flock(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
    heartbeat.INTERVAL_S = 0.1
with RunLock(RunDirectory(Path(folder)), run=run):
    if how == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        print(child, flush=True)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, run: str = "first", how: str = "flock") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), run, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline()) if how == "fork" else None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
