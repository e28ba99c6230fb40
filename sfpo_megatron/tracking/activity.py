"""What this process is at and how far it has come, out of its spans and reports."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sfpo_megatron.host.progress import forget_observer, observe_progress
from sfpo_megatron.host.spans import Detail, forget_watcher, watch_spans

_STARTING = {
    "import": "importing torch and Megatron",
    "data": "reading the data",
    "cluster": "starting Ray",
    "build": "building the model in Megatron",
    "engines": "waiting for the engines",
    "resume": "loading the checkpoint",
}
_LABELS = _STARTING | {
    "step": "training",
    "collect": "generation",
    "evaluate": "evaluation",
    "logprob": "log-probs",
    "reference": "reference log-probs",
    "sfpo": "passes",
    "passes": "pass",
    "wait": "waiting for rollouts",
    "refit": "refit",
    "save": "saving",
    "export": "exporting",
}
"""Span -> what it is called to a person; other spans are not shown."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Now:
    """What is being done, since when, and how much of it is done."""

    label: str = "starting"
    since: float = 0.0
    """By the monotonic clock."""
    unit: str = ""
    done: int = 0
    total: int = 0
    """0 where nothing is counted."""
    note: str = ""
    """What is waited for."""
    is_start: bool = True
    """Whether the run has yet to come to its first step or evaluation."""
    part: int = 0
    num_parts: int = 1
    """Pass of the step's passes, from 0: each counts `total`."""


class Activity:
    """Told of this thread's spans and reports; `now` may be read in any thread."""

    def __init__(self) -> None:
        self.now = Now(since=time.monotonic())
        self._thread = threading.get_ident()
        self._is_start = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Be told while the block runs."""
        watch_spans(self._span)
        observe_progress(self)
        try:
            yield
        finally:
            forget_observer(self)
            forget_watcher(self._span)

    @contextmanager
    def _span(self, name: str, details: dict[str, Detail]) -> Iterator[None]:
        if name not in _LABELS or threading.get_ident() != self._thread:
            yield
            return
        before = self.now
        self._is_start = self._is_start and name in (*_STARTING, "refit")
        label, since = _LABELS[name], time.monotonic()
        self.now = Now(label=label, since=since, is_start=self._is_start)
        if name == "passes":
            number, of = int(details.get("number", 1)), int(details.get("of", 1))
            self.now = replace(
                self.now,
                label=f"pass {number}/{of}",
                since=before.since,
                part=number - 1,
                num_parts=of,
            )
        try:
            yield
        finally:
            self.now = replace(before, is_start=self._is_start)

    def advanced(self, unit: str, done: int, total: int) -> None:
        """Take a count of what is being done."""
        if threading.get_ident() == self._thread:
            self.now = replace(self.now, unit=unit, done=done, total=total)

    def noted(self, text: str) -> None:
        """Take what is waited for."""
        if threading.get_ident() == self._thread:
            self.now = replace(self.now, note=text)
