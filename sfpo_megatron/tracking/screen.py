"""What a person, or a program, sees of a run on stdout: plain lines, a live display, little, or
JSON. A process has one screen; `open_screen` makes it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, Protocol, TextIO, TypeAlias

from sfpo_megatron.host.terminal import keep_stdout, takes_line_in_place
from sfpo_megatron.tracking.activity import Activity, Now
from sfpo_megatron.tracking.block import sample_block
from sfpo_megatron.tracking.details import Sample
from sfpo_megatron.tracking.pace import clock

Mode: TypeAlias = Literal["lines", "quiet", "json"]
_SAMPLE_CHARS = 600
_REMIND_S = 10.0
"""Between lines that say what is still waited for."""


class Screen(Protocol):
    """Takes what the sink `console` writes. `tick` is called in another thread than the rest."""

    @property
    def width(self) -> int | None:
        """Characters that fit into a line; None for any number."""

    shows_time_left: bool
    """Whether lines need not say how long the run still takes."""
    period_s: float
    """Seconds between calls of `tick`."""

    def metrics(self, record: Mapping[str, Any], lines: Sequence[str]) -> None:
        """A line of metrics.jsonl, and what it is to a person."""

    def text(self, line: str, *, important: bool = False) -> None:
        """A line for a person. `important`: a warning, or how the run has ended."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Sample rollouts of train step `step`, for a person to read."""

    def length(self, num_steps: int, left_s: float | None) -> None:
        """How long the run is, and how long it still takes, where that is known."""

    def tick(self, now: Now) -> None:
        """Show what is being done now."""

    def close(self) -> None:
        """Leave stdout as it was."""


class PlainScreen:
    """Lines without control characters, for a file, a pipe, or a terminal that takes no others."""

    shows_time_left = False
    period_s = 1.0

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: None for what stdout is at the time."""
        self._stream = stream
        self._last = time.monotonic()

    @property
    def width(self) -> int | None:
        """A line may be of any length."""
        return None

    def metrics(self, record: Mapping[str, Any], lines: Sequence[str]) -> None:
        for line in lines:
            self.text(line)

    def text(self, line: str, *, important: bool = False) -> None:
        stream = self._stream or sys.stdout
        # A model may write what the terminal's encoding has no letter for.
        encoding = stream.encoding or "utf-8"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
        self._last = time.monotonic()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.text(sample_block(step, samples, max_chars=_SAMPLE_CHARS))

    def length(self, num_steps: int, left_s: float | None) -> None:
        """The lines say it."""

    def tick(self, now: Now) -> None:
        """While the run starts, a line now and then: it is alive."""
        if now.is_start and time.monotonic() - self._last > _REMIND_S:
            self.text(f"{described(now)} ({clock(time.monotonic() - now.since)})")

    def close(self) -> None:
        """Nothing was changed."""


class QuietScreen(PlainScreen):
    """Warnings, and how the run has ended."""

    def metrics(self, record: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Nothing is said: metrics.jsonl has it."""

    def text(self, line: str, *, important: bool = False) -> None:
        if important:
            super().text(line)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing is said: samples.jsonl has them."""

    def tick(self, now: Now) -> None:
        """Nothing is said."""


class JsonScreen:
    """An object a line: those of metrics.jsonl, and events, which have `event`. Whatever else is
    printed goes to stderr until this process ends."""

    width = None
    shows_time_left = True
    period_s = 0.1

    def __init__(self) -> None:
        self._stdout = keep_stdout()
        self._lock = threading.Lock()
        self._last = ("", 0.0)  # what was waited for, and when that was said
        self._is_start = True

    def metrics(self, record: Mapping[str, Any], lines: Sequence[str]) -> None:
        self._write(record)

    def text(self, line: str, *, important: bool = False) -> None:
        self._event("message", important=important, text=line)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._event("sample", step=step, **sample.to_json())

    def length(self, num_steps: int, left_s: float | None) -> None:
        if left_s is not None:
            self._event("pace", num_steps=num_steps, left_s=round(left_s, 1))

    def tick(self, now: Now) -> None:
        """While the run starts, what it waits for: as that changes, and now and then; then that it
        has started."""
        what, clock_s = described(now), time.monotonic()
        if self._is_start and not now.is_start:
            self._event("started")
        self._is_start = now.is_start
        if now.is_start and (what != self._last[0] or clock_s - self._last[1] > _REMIND_S):
            self._last = (what, clock_s)
            waited_s = round(clock_s - now.since, 1)
            self._event("starting", stage=now.span, text=what, waited_s=waited_s)

    def close(self) -> None:
        self._stdout.close()

    def _event(self, event: str, **fields: Any) -> None:
        self._write({"event": event, **fields})

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._stdout.write(json.dumps(record, allow_nan=False) + "\n")
            self._stdout.flush()


def described(now: Now) -> str:
    """What is waited for, in one line."""
    return f"{now.label}: {now.note}" if now.note else now.label


_screens: list[Screen] = []  # one at most: a process has one stdout


def screen() -> Screen:
    """The screen of this process; plain lines where none was opened."""
    return _screens[-1] if _screens else PlainScreen()


@contextmanager
def open_screen(mode: Mode, stream: TextIO | None = None) -> Iterator[Screen]:
    """Make the screen of this process and keep it up to date; whatever ends the block, stdout is
    then as it was and no thread is left. `stream`: stderr, in place of stdout."""
    activity = Activity()
    with ExitStack() as closing:
        made = _made(mode, stream)
        closing.callback(made.close)
        _screens.append(made)
        closing.callback(_screens.pop)
        closing.enter_context(activity.watching())
        closing.enter_context(_ticking(made, activity))
        yield made


def _made(mode: Mode, stream: TextIO | None) -> Screen:
    if mode == "json":
        return JsonScreen()
    if mode == "quiet":
        return QuietScreen(stream)
    if not takes_line_in_place(stream or sys.stdout):
        return PlainScreen(stream)
    from sfpo_megatron.tracking.live import LiveScreen

    return LiveScreen(stream or sys.stdout)


@contextmanager
def _ticking(screen: Screen, activity: Activity) -> Iterator[None]:
    done = threading.Event()

    def tick() -> None:
        with suppress(OSError, ValueError):  # stdout is gone: the sink hears of it by itself
            while not done.wait(screen.period_s):
                screen.tick(activity.now)

    thread = threading.Thread(target=tick, name="screen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
