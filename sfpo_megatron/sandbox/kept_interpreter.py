"""An isolated interpreter that goes on from program to program, seen from its parent.

The limits are those of one program (`interpreter.py`), the seconds for each. What is in it is a
model's: it may write anything to any descriptor, so a reply that is none ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time

from sfpo_megatron.sandbox.interpreter import (
    OUTPUT_BYTES,
    Ran,
    command,
    environment,
    new_folder,
    request,
    signed,
)
from sfpo_megatron.sandbox.process import START_TIMEOUT_S, DidNotStart
from sfpo_megatron.sandbox.waiting import ready
from sfpo_megatron.types import Json

_CPU_S = 3600.0  # of the whole session; each program's seconds are counted here
_REPLY_BYTES = 64


class _Ended(Exception):
    """The interpreter is gone."""


class Session:
    """A running interpreter. `close` may come from another thread than `run`."""

    def __init__(self, *, memory_bytes: int) -> None:
        """DidNotStart where it cannot be had."""
        self._lock = threading.Lock()
        self._folder, self._output = new_folder(), tempfile.TemporaryFile()  # noqa: SIM115
        self._replies, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                command(),
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                cwd=self._folder.name,
                env=environment(self._folder.name),
                pass_fds=(theirs,),
            )
        except BaseException:
            os.close(self._replies)
            self._output.close()
            self._folder.cleanup()
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        self.is_open = True
        """False once it has ended: there is nothing more to run."""
        given: dict[str, Json] = {"mode": "script", "replies": theirs}
        try:
            self._exchange(request(given, self._folder.name, _CPU_S, memory_bytes), START_TIMEOUT_S)
        except (_Ended, TimeoutError) as error:
            printed = self._printed()
            self.close()
            raise DidNotStart(f"an interpreter did not start: {printed}") from error
        except BaseException:
            self.close()
            raise

    def run(self, code: str, *, timeout_s: float) -> Ran:
        """Run a program in it. Where that takes too long, or ends the interpreter, it is closed."""
        with self._lock:
            status: int | None
            try:
                status = self._exchange(json.dumps(code).encode() + b"\n", timeout_s)
            except TimeoutError:
                status, self.is_open = None, False
            except _Ended:
                self.is_open = False
                self._process.kill()
                status = signed(self._process.wait())
            ran = Ran(status=status, output=self._printed())
        if not self.is_open:
            self.close()
        return ran

    def close(self) -> None:
        """End the interpreter and what it has started, and remove its folder."""
        self._process.kill()  # what runs in it now ends
        with self._lock:
            self.is_open = False
            if self._output.closed:
                return
            self._process.wait()
            self._stdin.close()
            os.close(self._replies)
            self._output.close()
            self._folder.cleanup()

    def _exchange(self, line: bytes, timeout_s: float) -> int:
        """Write a line and read the status that answers it; TimeoutError, or _Ended."""
        left, reply = memoryview(line), b""
        deadline = time.monotonic() + timeout_s
        while not reply.endswith(b"\n"):
            wait = max(0.0, deadline - time.monotonic())
            to_write = [self._stdin.fileno()] if left else []
            readable, writable = ready([self._replies], to_write, wait)
            if not readable and not writable:
                if time.monotonic() < deadline:
                    continue
                raise TimeoutError
            try:
                if readable:
                    chunk = os.read(self._replies, _REPLY_BYTES)
                    if not chunk:
                        raise _Ended
                    reply += chunk
                else:
                    left = left[os.write(self._stdin.fileno(), left) :]
            except BrokenPipeError:
                raise _Ended from None
            if len(reply) > _REPLY_BYTES:
                raise _Ended
        try:
            return int(reply)
        except ValueError:
            raise _Ended from None

    def _printed(self) -> str:
        return os.pread(self._output.fileno(), OUTPUT_BYTES, 0).decode(errors="replace")
