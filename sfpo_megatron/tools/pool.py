"""Calls tools in processes of their own, with a time limit for each call.

What a model asks of a tool may hang it, flood it or crash it. So a tool runs in a process
(`runner.py`) that is killed and replaced when a call takes longer than `timeout_s` or ends it; the
model is told, and all else goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from sfpo_megatron.host.scratch import remove_abandoned
from sfpo_megatron.sandbox.interpreter import START_S
from sfpo_megatron.sandbox.output import OutputLog
from sfpo_megatron.sandbox.process import (
    DidNotStart,
    LimitedProcess,
    WorkerDied,
    WorkerTimeout,
)
from sfpo_megatron.tools import NotBegun, ToolError
from sfpo_megatron.tools.declared import ToolChoice
from sfpo_megatron.tools.interpreters import Interpreters
from sfpo_megatron.tools.runner import ToolReply
from sfpo_megatron.types import Json

Worker: TypeAlias = LimitedProcess[ToolReply]
SCRATCH = "sfpo-tools-"
"""How the names of scratch directories begin."""
_SEND_TIMEOUT_S = 60.0
_GRACE_S = 3.0  # for a tool that keeps the limit itself
_NUM_SEND_ATTEMPTS = 3
_MOST_NOT_BEGUN = 16

log = logging.getLogger(__name__)


class ToolsFailed(RuntimeError):
    """The processes do not start, or take no call, or begin no program: nothing that a model has
    done."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ToolResult:
    """What the model is told of a call."""

    text: str
    failed: bool = False


class ToolPool:
    """Processes that have loaded the tools, started when the pool is made."""

    def __init__(
        self, choices: Sequence[ToolChoice], *, timeout_s: float, num_workers: int
    ) -> None:
        """PluginError, CannotServe or ToolsFailed where a tool cannot be loaded."""
        self._choices, self._timeout_s = tuple(choices), timeout_s
        self._limit_s = {choice.called: timeout_s + _more_s(choice) for choice in choices}
        self._number = {choice.called: index for index, choice in enumerate(choices)}
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tool")
        self._output = OutputLog(None)
        self._closing = threading.Event()
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self._workers: set[Worker] = set()
        self._interpreters: dict[str, Interpreters] = {}
        self._num_not_begun: dict[str, int] = {}  # in a row
        remove_abandoned(SCRATCH)
        starting = [self._threads.submit(self._start) for _ in range(num_workers)]
        errors = [error for future in starting if (error := future.exception())]
        if errors:
            self.close()
            raise errors[0]
        for future in starting:
            self._idle.put(future.result())
        for choice in choices:
            if choice.is_persistent:
                settings = choice.load(timeout_s=timeout_s).settings
                made = Interpreters(settings, num_workers=num_workers)
                self._interpreters[choice.called] = made

    @contextmanager
    def episode(self) -> Iterator[None]:
        """An episode: calls inside of it may keep something from one to the next."""
        with ExitStack() as episodes:
            for interpreters in self._interpreters.values():
                episodes.enter_context(interpreters.episode())
            yield

    @property
    def names(self) -> tuple[str, ...]:
        """What the model calls the tools."""
        return tuple(self._number)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.pid for worker in self._workers]

    async def call(self, name: str, arguments: Mapping[str, Json]) -> ToolResult:
        """Call a tool; as many at a time as there are processes."""
        if name not in self._number:
            known = ", ".join(self._number) or "none"
            return ToolResult(text=f"unknown tool {name!r}; the tools are: {known}", failed=True)
        try:
            if name in self._interpreters:
                result = ToolResult(text=await self._interpreters[name].call(arguments))
            else:
                loop = asyncio.get_running_loop()
                result = await loop.run_in_executor(self._threads, self._call, name, arguments)
        except NotBegun as error:
            return self._not_begun(name, error)
        except ToolError as error:
            result = ToolResult(text=str(error), failed=True)
        self._num_not_begun.pop(name, None)
        return result

    def _not_begun(self, name: str, error: NotBegun) -> ToolResult:
        """What the model is told; ToolsFailed where no call in a row had a program begun."""
        self._num_not_begun[name] = count = self._num_not_begun.get(name, 0) + 1
        log.warning("a call of the tool %s: %s", name, error)
        if count < _MOST_NOT_BEGUN:
            return ToolResult(text=str(error), failed=True)
        raise ToolsFailed(
            f"{count} calls of the tool {name} in a row, and this machine began no program: {error}"
        ) from error

    def close(self) -> None:
        """End the processes; calls that wait for one fail."""
        self._closing.set()
        for worker in tuple(self._workers):
            worker.interrupt()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        for interpreters in self._interpreters.values():
            interpreters.close()

    def _start(self) -> Worker:
        """Only in a thread of the pool: the process ends with the thread that has started it."""
        tools = json.dumps([[choice.name, dict(choice.settings)] for choice in self._choices])
        arguments = (str(self._timeout_s), tools)
        module = "sfpo_megatron.tools.runner"
        try:
            worker: Worker = LimitedProcess(module, arguments, scratch=SCRATCH, output=self._output)
        except DidNotStart as error:
            raise ToolsFailed(f"a process for tools: {error}") from error
        self._workers.add(worker)
        return worker

    def _call(self, name: str, arguments: Mapping[str, Json]) -> ToolResult:
        if self._closing.is_set():
            raise ToolsFailed("the tools are closed")
        worker, usable = self._idle.get(), None
        try:
            worker = self._send(worker, name, arguments)
            reply = worker.read(self._limit_s[name])
            usable = worker
        except (WorkerTimeout, WorkerDied) as error:
            self._end(worker)
            timed_out = isinstance(error, WorkerTimeout)
            took = f"took longer than {self._timeout_s:g} s"
            return _failed(name, took if timed_out else "crashed, or took more memory than it may")
        finally:
            self._idle.put(usable)
        if reply.get("not_begun"):
            raise NotBegun(reply["error"])
        if "error" in reply:
            return ToolResult(text=reply["error"], failed=True)
        return ToolResult(text=reply["result"])

    def _send(self, worker: Worker | None, name: str, arguments: Mapping[str, Json]) -> Worker:
        """Hand a call to a process, or to another one where it ended while it was idle."""
        request = {
            "tool": self._number[name],
            "arguments": dict(arguments),
            "cpu_s": self._timeout_s,
        }
        for _ in range(_NUM_SEND_ATTEMPTS):
            taken = worker or self._start()
            try:
                taken.send(request, _SEND_TIMEOUT_S)
                return taken
            except (WorkerDied, WorkerTimeout):
                self._end(taken)
                worker = None
        raise ToolsFailed(f"{_NUM_SEND_ATTEMPTS} processes in a row took no call of {name}")

    def _end(self, worker: Worker | None) -> None:
        if worker is not None:
            self._workers.discard(worker)
            worker.kill()


def _more_s(choice: ToolChoice) -> float:
    """What a tool that keeps the limit itself may take beyond it before its process is ended."""
    if "timeout_s" not in choice.load().hidden:
        return 0.0
    return _GRACE_S + (START_S if choice.name == "python" else 0.0)


def _failed(name: str, how: str) -> ToolResult:
    log.warning("a call of the tool %s %s", name, how)
    return ToolResult(text=f"{name} {how}", failed=True)
