"""The tool `python` with an interpreter that an episode keeps from call to call.

An interpreter is started by the first call of an episode, and ends with it. That a program has
ended it, or took too long, is told to the model; the next call gets a fresh one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

from sfpo_megatron.sandbox.kept_interpreter import Session
from sfpo_megatron.sandbox.process import DidNotStart
from sfpo_megatron.tools import NotBegun, ToolError
from sfpo_megatron.tools.declared import BoundTool
from sfpo_megatron.tools.python import shown
from sfpo_megatron.types import Json

_GONE = "the next call gets a fresh interpreter, without what was defined"


class Seat:
    """What an episode has of it; used in threads, one call at a time."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        """Calls of one turn come together, and are made in their order."""
        self._lock = threading.Lock()
        self._session: list[Session] = []  # the open one, if there is one
        self._left = False

    def python(
        self,
        code: str,
        *,
        timeout_s: float = 5.0,
        memory_mib: int = 512,
        interpreter: str = "persistent",
    ) -> str:
        """`tools.python.python`; ToolError where the interpreter is gone."""
        with self._lock:
            if self._left:
                raise ToolError("the episode has ended")
            if not self._session:
                try:
                    self._session.append(Session(memory_bytes=memory_mib << 20))
                except (DidNotStart, OSError) as error:
                    raise NotBegun(f"no interpreter could be started ({error})") from error
            (session,) = self._session
        ran = session.run(str(code), timeout_s=timeout_s)
        if session.is_open:
            return shown(ran.output).rstrip("\n")
        with self._lock:
            self._session.clear()
        how = "ended: the program has ended its interpreter"
        if ran.status is None:
            how = f"ended: it took longer than {timeout_s:g} s"
        elif ran.status < 0:
            how = f"ended by signal {-ran.status}"
        raise ToolError(f"{shown(ran.output)}[{how}; {_GONE}]")

    def leave(self) -> None:
        """End the interpreter, and what runs in it."""
        with self._lock:
            self._left = True
            sessions = tuple(self._session)
        for session in sessions:
            session.close()


class Interpreters:
    """Interpreters of the episodes that run now."""

    def __init__(self, settings: Mapping[str, Json], *, num_workers: int) -> None:
        """`settings`: those of `python`; `num_workers`: calls at a time."""
        self._settings = dict(settings)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="interpreter")
        self._leaving = ThreadPoolExecutor(num_workers, thread_name_prefix="leaving")
        self._seats: set[Seat] = set()
        self._seat: ContextVar[Seat] = ContextVar("seat")

    @contextmanager
    def episode(self) -> Iterator[None]:
        """An episode: what runs inside of this context, of which each task of asyncio has its
        own."""
        seat = Seat()
        self._seats.add(seat)
        before = self._seat.set(seat)
        try:
            yield
        finally:
            self._seat.reset(before)
            self._seats.discard(seat)
            try:  # not here, in the loop of all episodes: an interpreter may only be starting
                self._leaving.submit(seat.leave)
            except RuntimeError:  # closed
                seat.leave()

    async def call(self, arguments: Mapping[str, Json]) -> str:
        """What the program printed; ToolError for arguments that are not the tool's, and where the
        interpreter is gone."""
        seat = self._seat.get()
        tool, loop = BoundTool(seat.python, self._settings), asyncio.get_running_loop()
        async with seat.turn:
            return await loop.run_in_executor(self._threads, tool.call, arguments)

    def close(self) -> None:
        """End all interpreters."""
        for seat in tuple(self._seats):
            seat.leave()
        self._threads.shutdown(cancel_futures=True)
        self._leaving.shutdown()
