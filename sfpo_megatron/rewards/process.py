"""One scoring process, seen from its parent: start, send a batch, read results by a deadline."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from sfpo_megatron.rewards import verifier_module

START_TIMEOUT_S = 120.0
"""For the imports of a verifier (reasoning_gym: 2 to 7 s on a busy machine)."""
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)


class WorkerDied(Exception):
    """The process ended while it scored an item (out of memory, a crash of native code...)."""


class WorkerTimeout(Exception):
    """No result within the time limit."""


class WorkerProcess:
    """A running `rewards/worker.py`. Not thread-safe: one thread at a time."""

    def __init__(self, verifier: str) -> None:
        module = verifier_module(verifier)
        lifeline_read, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sfpo_megatron.rewards.worker",
                    module,
                    str(lifeline_read),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(lifeline_read,),
                env=_environment(),
            )
        finally:
            os.close(lifeline_read)
        self._lines: deque[bytes] = deque()
        self._partial = b""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            self.read(START_TIMEOUT_S)
        except (WorkerDied, WorkerTimeout) as error:
            code = self._process.poll()
            self.kill()
            raise RuntimeError(
                f"reward.function {verifier}: its scoring process did not start "
                f"(exit code {code}; its output is above)"
            ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, batch: dict[str, Any], timeout_s: float) -> None:
        """Write a batch; the process must be idle (all results read)."""
        data = memoryview(json.dumps(batch).encode() + b"\n")
        os.set_blocking(self._stdin, False)
        deadline = time.monotonic() + timeout_s
        while data:
            if not select.select([], [self._stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                raise WorkerTimeout
            try:
                data = data[os.write(self._stdin, data) :]
            except BrokenPipeError as error:
                raise WorkerDied from error

    def read(self, timeout_s: float) -> Any:
        """The next result. Past the time limit it looks once more, so that a parent that was not
        scheduled in time does not take its own delay for the worker's."""
        deadline = time.monotonic() + timeout_s
        while not self._lines:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([self._stdout], [], [], wait)[0]:
                raise WorkerTimeout
            data = os.read(self._stdout, 1 << 16)
            if not data:
                raise WorkerDied
            *lines, self._partial = (self._partial + data).split(b"\n")
            self._lines.extend(lines)
        return json.loads(self._lines.popleft())

    def kill(self) -> None:
        """End it at once and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def _environment() -> dict[str, str]:
    """The parent's, with this very package first and one thread for numeric libraries: a scoring
    process shares the machine with the trainer (and threads' stacks count as address space)."""
    path = os.pathsep.join(filter(None, (_PACKAGE_PARENT, os.environ.get("PYTHONPATH"))))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": path}
