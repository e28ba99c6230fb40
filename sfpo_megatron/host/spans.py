"""Spans of time with a name, for whoever watches: a trace, NVTX, a profiler. Standard library only.

Nobody watches by default, and a span then costs a function call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, TypeAlias

Detail: TypeAlias = int | str


class Watcher(Protocol):
    """Who is told of every span of this process."""

    def __call__(self, name: str, details: dict[str, Detail]) -> AbstractContextManager[None]:
        """Entered as the span begins, left as it ends; may be called in any thread."""


_watchers: list[Watcher] = []


def watch_spans(watcher: Watcher) -> None:
    """Tell `watcher` of every span that begins from now on."""
    _watchers.append(watcher)


def forget_watcher(watcher: Watcher) -> None:
    """Tell it of no more; of those that are open it hears the end."""
    if watcher in _watchers:
        _watchers.remove(watcher)


@contextmanager
def span(name: str, **details: Detail) -> Iterator[None]:
    """Name what happens inside. `details`: numbers and words that tell it from others; `track`
    names the line of a trace that it belongs on, where that is not this process's own."""
    with ExitStack() as watched:
        for watcher in list(_watchers):
            watched.enter_context(watcher(name, details))
        yield
