"""One limited process, seen from its parent: start, send a request, read replies by a deadline.

What the process prints comes through a pipe of its own and is taken out whenever the parent waits
for it, so that no amount of output blocks, fills or ends anything.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from sfpo_megatron.errors import WrongInput
from sfpo_megatron.host.scratch import Scratch
from sfpo_megatron.host.variables import variables
from sfpo_megatron.sandbox.output import OutputLog
from sfpo_megatron.sandbox.waiting import ready

Reply = TypeVar("Reply", bound=Mapping[str, object])
START_TIMEOUT_S = 120.0
"""Time that the imports of a verifier may take (reasoning_gym: 2 to 7 s on a busy machine)."""
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
_CHUNK_BYTES = 1 << 16
_LAST_CHUNKS = 16  # a pipe holds one
_EXIT_S = 5.0


class WorkerDied(Exception):
    """The process ended while it worked (out of memory, a crash of native code...)."""


class WorkerTimeout(Exception):
    """No reply within the time limit."""


class DidNotStart(Exception):
    """The process ended, or took too long, before it was ready: how, and its last output."""


class CannotServe(Exception):
    """The process has said why it cannot do its work: it could not load what it was given."""


class WrongFunction(CannotServe, WrongInput):
    """The same, and another start would not help."""


class LimitedProcess(Generic[Reply]):
    """A running module that limits itself (`limits.py`), writes {"ready": true} or {"failed": why}
    once, and then replies to requests, all in lines of JSON. Not thread-safe: one thread at a time;
    it ends with the thread that started it."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, scratch: str, output: OutputLog
    ) -> None:
        """Run `python -m MODULE LIFELINE_FD ARGUMENTS...` and return when it is ready; DidNotStart
        or CannotServe. `scratch`: how the name of its directory begins."""
        self._output_log = output
        self._lines: deque[bytes] = deque()
        self._partial = b""
        self._scratch = Scratch(scratch)
        lifeline_read, self._lifeline = os.pipe()
        # -P: the working directory comes last on sys.path (plugins.load), not first.
        command = [sys.executable, "-P", "-m", module, str(lifeline_read)]
        try:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(lifeline_read,),
                env=_environment(self._scratch.path),
                process_group=0,  # what it starts ends with it
            )
        except BaseException:
            os.close(self._lifeline)
            self._scratch.remove()
            raise
        finally:
            os.close(lifeline_read)
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        self._pipes = stdin, stdout, stderr
        self._stdin, self._results, self._output = (pipe.fileno() for pipe in self._pipes)
        self._readable = [self._results, self._output]
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._output, False)
        self._check_started()

    def _check_started(self) -> None:
        try:
            reply = self.read(START_TIMEOUT_S)
        except (WorkerDied, WorkerTimeout) as error:
            self.kill(grace_s=_EXIT_S if isinstance(error, WorkerDied) else 0.0)
            how = f"exit code {self._process.returncode}"
            if isinstance(error, WorkerTimeout):
                how = f"took longer than {START_TIMEOUT_S:g} s"
            raise DidNotStart(
                f"did not start ({how}); its output ({self._output_log.name}) ends with:\n"
                f"{self._output_log.tail}"
            ) from error
        if "failed" in reply:
            self.kill()
            kind = CannotServe if reply.get("may_pass") else WrongFunction
            raise kind(f"{reply['failed']} (the traceback is in {self._output_log.name})")

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Mapping[str, object], timeout_s: float) -> None:
        """Write a request; the process must be idle (all replies read)."""
        data = memoryview(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout_s
        while data:
            readable, writable = self._wait(deadline, to_write=[self._stdin])
            if self._output in readable:
                self._take_output()
            elif self._results in readable:  # nothing was asked for: it has ended
                raise WorkerDied
            if not writable:
                continue
            try:
                data = data[os.write(self._stdin, data) :]
            except BrokenPipeError as error:
                raise WorkerDied from error

    def read(self, timeout_s: float) -> Reply:
        """The next reply. Past the time limit it looks once more, so that a parent that was not
        scheduled in time does not take its own delay for the worker's."""
        deadline = time.monotonic() + timeout_s
        while not self._lines:
            readable, _ = self._wait(deadline)
            if self._output in readable:
                self._take_output()
            if self._results in readable:
                self._take_results()
        try:
            reply: Reply = json.loads(self._lines.popleft())
        except ValueError as error:  # something else has written there
            raise WorkerDied from error
        return reply

    def interrupt(self) -> None:
        """End what it does; from any thread. Who waits for it sees it die, and has to `kill` it."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End it and all that it has started, reap it and remove its scratch directory. `grace_s`:
        for one that is about to end, so that its exit code is its own."""
        if self._lifeline < 0:
            return
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        self._process.wait()
        for _ in range(_LAST_CHUNKS):  # not all that comes: who escaped the group may go on writing
            if self._output not in self._readable or not self._take_output():
                break
        for pipe in self._pipes:
            pipe.close()
        os.close(self._lifeline)
        self._lifeline = -1
        self._scratch.remove()

    def _wait(
        self, deadline: float, to_write: list[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """The pipes that can be read and written; WorkerTimeout past the deadline unless there is
        more than output."""
        wait = max(0.0, deadline - time.monotonic())
        readable, writable = ready(self._readable, to_write or [], wait)
        if wait == 0.0 and not writable and self._results not in readable:
            raise WorkerTimeout
        return readable, writable

    def _take_results(self) -> None:
        data = os.read(self._results, _CHUNK_BYTES)
        if not data:
            raise WorkerDied
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._lines.extend(lines)

    def _take_output(self) -> bool:
        """Move what was printed into the log; whether there may be more."""
        try:
            data = os.read(self._output, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:  # ended, and all that hold the pipe with it
            self._readable.remove(self._output)
        self._output_log.write(data)
        return bool(data)


def _environment(scratch: str) -> dict[str, str]:
    """The parent's, with this very package first, a directory for temporary files, and one thread
    for numeric libraries: the process shares the machine with the trainer (and threads' stacks
    count as address space)."""
    path = os.pathsep.join(filter(None, (_PACKAGE_PARENT, os.environ.get("PYTHONPATH"))))
    return {**os.environ, **variables("scorer"), "PYTHONPATH": path, "TMPDIR": scratch}
