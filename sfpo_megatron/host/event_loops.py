"""An event loop in a thread of its own, and calls from one loop to another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_END_S = 5.0


class LoopThread:
    """Runs what it is given, whichever loop or thread asks; work that calls `sys.exit` ends itself
    alone."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
        """The result, for a thread that may wait; TimeoutError after `timeout_s`."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """The result, for the running loop. Cancelling it cancels `work`."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def close(self) -> None:
        """Cancel what runs and end the thread; one that is blocked is left to itself."""
        if self._thread.is_alive():
            self._closing.set()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            with suppress(SystemExit, KeyboardInterrupt):  # of one task, whose waiter has it too
                self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.wait(tasks, timeout=_END_S) if tasks else _nothing())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


async def _nothing() -> None:
    """There was no task."""
