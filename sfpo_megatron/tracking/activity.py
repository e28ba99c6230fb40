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
    "report": "writing the report",
}
"""Span -> what it is called to a person; other spans are not shown."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Now:
    """What is being done, since when, and how much of it is done."""

    span: str = ""
    label: str = "starting"
    since: float = 0.0
    """Seconds of the monotonic clock."""
    unit: str = ""
    done: int = 0
    total: int = 0
    """0 where nothing is counted."""
    note: str = ""
    """What is waited for."""
    is_start: bool = True
    """Whether the run has yet to come to its first step or evaluation."""
    step: int = 0
    """The step that is under way, or was last; 0 before the first."""
    part: int = 0
    num_parts: int = 1
    """Number of this one, from 0, where several of the same follow one another, such as passes;
    each counts `total`."""


class Activity:
    """Told of this thread's spans and reports; `now` may be read in any thread."""

    def __init__(self) -> None:
        self.now = Now(since=time.monotonic())
        self._thread = threading.get_ident()
        self._is_start = True
        self._step = 0
        self._depth = 0

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
        if name == "step":
            self._step = int(details.get("step", 0))
        self._depth += 1
        self.now = self._begun(name, _LABELS[name])
        if "of" in details:
            number, of = int(details["number"]), int(details["of"])
            label = f"{self.now.label} {number}/{of}" if of > 1 else self.now.label
            since = before.since if self._depth > 1 else self.now.since
            self.now = replace(self.now, label=label, since=since, part=number - 1, num_parts=of)
        try:
            yield
        finally:
            self._depth -= 1
            is_between = self._depth == 0 and not self._is_start
            self.now = self._begun("", "between steps") if is_between else before

    def _begun(self, name: str, label: str) -> Now:
        return Now(
            span=name,
            label=label,
            since=time.monotonic(),
            step=self._step,
            is_start=self._is_start,
        )

    def advanced(self, unit: str, done: int, total: int) -> None:
        """Take a count of what is being done."""
        if threading.get_ident() == self._thread:
            self.now = replace(self.now, unit=unit, done=done, total=total)

    def noted(self, text: str) -> None:
        """Take what is waited for."""
        if threading.get_ident() == self._thread:
            self.now = replace(self.now, note=text)
