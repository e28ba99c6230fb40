"""The screen of a terminal: lines scroll, and below them one is redrawn with what runs now."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from sfpo_megatron.host.terminal import WIPE, takes_line_in_place
from sfpo_megatron.tracking.activity import Now
from sfpo_megatron.tracking.pace import clock
from sfpo_megatron.tracking.screen import PlainScreen

_SHORT_S = 100.0


class LiveScreen(PlainScreen):
    """Redraws one line: what a process of ours, or of somebody else's, writes meanwhile begins on
    a line of its own, as the one that is redrawn is as wide as the terminal."""

    shows_time_left = True
    period_s = 0.2

    def __init__(self, stream: TextIO) -> None:
        """`stream`: stdout or stderr, a terminal."""
        super().__init__(stream)
        self._streams = sys.stdout, sys.stderr
        # highlight, markup: what is shown is data, and may have brackets in it.
        self._console = Console(
            file=stream, force_terminal=True, highlight=False, markup=False, emoji=False
        )
        self._progress = Progress(
            TextColumn("{task.fields[head]}", markup=False),
            TextColumn("{task.description}", markup=False, table_column=_shrinking()),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.fields[tail]}", markup=False),
            console=self._console,
            auto_refresh=False,
            transient=True,
            expand=True,
            redirect_stdout=takes_line_in_place(sys.stdout),
            redirect_stderr=takes_line_in_place(sys.stderr),
        )
        self._task = self._progress.add_task("starting", total=None, head="", tail="")
        self._num_steps = 0
        self._end: float | None = None  # of the run, by the monotonic clock
        stream.write(WIPE)  # what the launcher has announced
        stream.flush()
        self._progress.start()
        os.register_at_fork(after_in_child=self._leave)

    @property
    def width(self) -> int | None:
        """Columns of the terminal."""
        return self._console.width

    def text(self, line: str, *, important: bool = False) -> None:
        encoding = self._console.encoding
        shown = line.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text(shown), soft_wrap=True)

    def length(self, num_steps: int, left_s: float | None) -> None:
        self._num_steps = num_steps
        self._end = None if left_s is None else time.monotonic() + left_s

    def tick(self, now: Now) -> None:
        """Redraw the line."""
        done, total = now.part * now.total + now.done, now.num_parts * now.total
        tail = f"{now.done}/{now.total}  " if now.total else ""
        if now.span == "step":  # of a warm start: nothing in it takes long enough to be shown
            done, total, tail = now.step - 1, self._num_steps, ""
        since_s = time.monotonic() - now.since
        tail += f"{since_s:.0f} s" if since_s < _SHORT_S else clock(since_s)
        if self._end is not None:
            tail += f"  ETA {clock(max(0.0, self._end - time.monotonic()))}"
        self._progress.update(
            self._task,
            head=f"step {now.step}/{self._num_steps}" if now.step else "",
            description=f"{now.label}: {now.note}" if now.note else now.label,
            completed=done,
            total=total or None,
            tail=tail,
        )
        self._progress.refresh()

    def close(self) -> None:
        self._progress.stop()

    def _leave(self) -> None:
        """A process that is forked from this one has the streams, not the display."""
        if self._progress.live.is_started:
            sys.stdout, sys.stderr = self._streams


def _shrinking() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")
