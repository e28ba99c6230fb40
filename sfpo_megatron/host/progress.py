"""How far what this process does has come, for whoever watches. Standard library only.

Nobody watches by default, and a report then costs a function call. What is being done is a span's
name (host/spans.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Observer(Protocol):
    """Who is told how far this process has come."""

    def advanced(self, unit: str, done: int, total: int) -> None:
        """`done` of `total` units, such as rollouts, of what the process is doing now."""

    def noted(self, text: str) -> None:
        """What the process waits for now."""


_observers: list[Observer] = []


def observe_progress(observer: Observer) -> None:
    """Tell `observer` of everything that is reported from now on."""
    _observers.append(observer)


def forget_observer(observer: Observer) -> None:
    """Tell it of no more."""
    if observer in _observers:
        _observers.remove(observer)


def is_observed() -> bool:
    """Whether somebody is told: what has to be asked of another process need not be, else."""
    return bool(_observers)


def advance(unit: str, done: int, total: int) -> None:
    """Report `done` of `total`."""
    for observer in _observers:
        observer.advanced(unit, done, total)


def note(text: str) -> None:
    """Report what is waited for."""
    for observer in _observers:
        observer.noted(text)


def counted(unit: str, items: Sequence[T]) -> Iterator[T]:
    """The same items; each is reported once the next is asked for."""
    total = len(items)
    advance(unit, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        advance(unit, done, total)
