"""Spans of all processes of a run, put together as one picture of a train step.

Each process appends its spans to a file of its own in RUN/trace/spans, a line a span. Rank 0 makes
RUN/trace/step_0000005.json of them, in the Trace Event Format that Perfetto and chrome://tracing
open. The clock is the wall clock: processes of one host share it, those of several as far as their
hosts' clocks agree. A picture begins with its step and ends where the next begins, so that
evaluations and checkpoints are in it. Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.host.spans import Detail, forget_watcher, watch_spans
from sfpo_megatron.outputs.directory import RunDirectory

STEP = "step"
"""Name of the span of a train step, whose number is its detail of the same name."""
_MAIN_PROCESS = "rank 0"
_SUFFIX = ".jsonl"
Event: TypeAlias = dict[str, str | float | dict[str, Detail]]


class Span(NamedTuple):
    """One line of a span file; times in nanoseconds since the epoch."""

    name: str
    begin: int
    end: int
    track: str
    """Line of the trace that it belongs on; empty for that of the process itself."""
    details: dict[str, Detail]


def record_spans(run: RunDirectory, process: str) -> None:
    """Write the spans of this process from now on, where the run asks for it (`begin_trace`).
    `process`: rank N, controller or engine N."""
    folder = run.spans
    if folder.is_dir():
        file = f"{process.replace(' ', '-')}.{socket.gethostname()}.{os.getpid()}"
        watch_spans(SpanFile(folder / (file + _SUFFIX), process))


class SpanFile:
    """Writes spans until it cannot, or until rank 0 has removed the folder."""

    def __init__(self, path: Path, process: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptors = [os.open(path, flags, 0o644)]  # none once it is closed
        self._lock = threading.Lock()
        self._offset = time.time_ns() - time.monotonic_ns()  # a clock that is set moves no span
        self._write([process, f"{process} ({socket.gethostname()}, pid {os.getpid()})"])

    @contextmanager
    def __call__(self, name: str, details: dict[str, Detail]) -> Iterator[None]:
        """Write the span as it ends."""
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            end, rest = time.monotonic_ns(), dict(details)
            track = str(rest.pop("track", ""))
            self._write(Span(name, begin + self._offset, end + self._offset, track, rest))

    def _write(self, line: Sequence[str | int | dict[str, Detail]]) -> None:
        with self._lock:
            for descriptor in self._descriptors:
                try:
                    if os.fstat(descriptor).st_nlink:
                        os.write(descriptor, json.dumps(line).encode() + b"\n")
                        return
                except OSError:  # a full disk, a file system that has gone: no reason to end a run
                    pass
                os.close(descriptor)
            self._descriptors = []
        forget_watcher(self)


class NoTrace:
    """What a run without `trace.steps` has, and every rank but 0."""

    def logged(self, step: int) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """There is nothing to remove."""


class Trace:
    """Draws the pictures of a run, on rank 0."""

    def __init__(self, run: RunDirectory, steps: Iterable[int]) -> None:
        self._run = run
        self._steps = sorted(steps)

    def logged(self, step: int) -> None:
        """Draw the steps before this one, whose metrics are there: their pictures are whole."""
        while self._steps and self._steps[0] < step:
            self._draw(self._steps.pop(0))
        if not self._steps:
            self.close()

    def close(self) -> None:
        """Draw what the run has come to of what is left, and end the writing everywhere."""
        for step in self._steps:
            self._draw(step)
        self._steps = []
        shutil.rmtree(self._run.spans, ignore_errors=True)

    def _draw(self, step: int) -> None:
        path = self._run.trace / f"step_{step:07}.json"
        try:
            if found := picture(self._run.spans, step):
                text = json.dumps({"traceEvents": found, "displayTimeUnit": "ms"})
                with replacing(path) as aside:
                    aside.write_text(text, "utf-8")
        except OSError as error:  # a picture is no reason to end a run
            print(f"warning: {path} is not drawn: {error}", file=sys.stderr, flush=True)


def begin_trace(run: RunDirectory, steps: Iterable[int]) -> Trace | NoTrace:
    """Begin to record, for the pictures of `steps`; on rank 0, before other processes call
    `record_spans`. What an earlier start has left half done is removed."""
    shutil.rmtree(run.spans, ignore_errors=True)
    if not (wanted := list(steps)):
        return NoTrace()
    run.spans.mkdir(parents=True, exist_ok=True)  # NFS keeps what an old process has open
    return Trace(run, wanted)


def picture(folder: Path, step: int) -> list[Event]:
    """The events of a train step, over all span files of `folder`; empty if rank 0 has not been
    through it."""
    found = [_read(path) for path in folder.glob(f"*{_SUFFIX}")]
    files = sorted((file for file in found if file[0]), key=lambda file: _order(file[0]))
    begins = sorted(
        (span.begin, span.details["step"] == step)
        for process, _, spans in files
        if process == _MAIN_PROCESS
        for span in spans
        if span.name == STEP and "step" in span.details
    )
    own = [number for number, (_, is_it) in enumerate(begins) if is_it]
    if not own:
        return []
    begin = begins[own[0]][0]
    end = begins[own[0] + 1][0] if own[0] + 1 < len(begins) else None
    events: list[Event] = []
    for number, (_, title, spans) in enumerate(files, 1):
        inside = [s for s in spans if s.end > begin and (end is None or s.begin < end)]
        # Another rank may be ahead of rank 0 by a moment.
        inside = [s for s in inside if s.name != STEP or s.details.get(STEP) == step]
        events += _process(number, title, inside, begin)
    return events


def _process(number: int, title: str, spans: Sequence[Span], zero: int) -> Iterator[Event]:
    """The events of one process; `zero`: where the step begins."""
    if not spans:
        return
    yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": title}}
    yield {"ph": "M", "name": "process_sort_index", "pid": number, "args": {"sort_index": number}}
    line = 0
    for track in sorted({span.track for span in spans}):
        for lane in lanes([span for span in spans if span.track == track]):
            line += 1
            at: Event = {"pid": number, "tid": line}
            yield {"ph": "M", "name": "thread_name", **at, "args": {"name": track or "main"}}
            for span in lane:
                times = {"ts": (span.begin - zero) / 1e3, "dur": (span.end - span.begin) / 1e3}
                yield {"ph": "X", "name": span.name, **at, **times, "args": span.details}


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans on as few lines as keep those that overlap without one being inside the other
    apart: a viewer draws a line's spans as a stack of calls."""
    found: list[tuple[list[Span], list[Span]]] = []  # a lane, and its spans that are open
    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        for lane in found:
            still_open = [other for other in lane[1] if other.end > span.begin]
            if not still_open or still_open[-1].end >= span.end:
                break
        else:
            lane, still_open = ([], []), []
            found.append(lane)
        lane[0].append(span)
        lane[1][:] = [*still_open, span]
    return [spans_of for spans_of, _ in found]


def _read(path: Path) -> tuple[str, str, list[Span]]:
    """Name and title of a process, and its spans. What a full disk or the moment has cut short is
    left out: of a file that does not say whose it is everything, the name included."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    head = _parsed(lines[0]) if lines else []
    if len(head) != 2:
        return "", "", []
    process, title = head
    fields = (_parsed(line) for line in lines[1:])
    return process, title, [Span(*found) for found in fields if len(found) == len(Span._fields)]


def _parsed(line: str) -> list[Any]:
    """The entries of a line; none where it is no whole one."""
    try:
        found = json.loads(line)
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _order(process: str) -> tuple[int, int]:
    """Ranks, controller, engines, by their numbers."""
    kind, _, number = process.partition(" ")
    return ("rank", "controller", "engine").index(kind), int(number or 0)
