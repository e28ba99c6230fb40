"""An update in steps that all trainer ranks take in the same order: attach, begin, rounds, end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

Where = TypeVar("Where")


class Stepwise(ABC, Generic[Where]):
    """Knows which step is next, so that an update can be followed to its end from wherever a
    failure left it. `Where` says where a new sending end is to be found."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self._next_round = 0
        self._attached = self._begun = self._ended = True
        self._verify = False

    def restart(self, *, fresh: bool, verify: bool) -> None:
        """Begin another update. `fresh`: with a new sending end; `verify`: with checksums."""
        self._next_round, self._verify = 0, verify
        self._attached, self._begun, self._ended = not fresh, False, False

    def attach(self, where: Where | None) -> None:
        """Take part in a new sending end: the sender says where it is, the other ranks (and the
        sender where it failed) pass None. Collective."""
        self._attached = True
        self._attach(where)

    def begin(self) -> None:
        """Begin the update. Collective."""
        self._begun = True
        self._begin()

    def take_round(self) -> int:
        """Number of the round that is made now."""
        number = self._next_round
        self._next_round += 1
        return number

    def end(self) -> bool:
        """End the update; whether everything was sent that should be. Collective."""
        self._ended = True
        return self._end()

    def follow(self) -> None:
        """Go through everything that is left, with nothing more sent from here. Collective."""
        if not self._attached:
            self.attach(None)
        if not self._begun:
            self.begin()
        while self._next_round < self.num_rounds:
            self.follow_round()
        if not self._ended:
            self.end()

    @abstractmethod
    def _attach(self, where: Where | None) -> None: ...

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def follow_round(self) -> None:
        """Make the next round on a rank that does not hand it to the engines. Collective."""

    @abstractmethod
    def _end(self) -> bool: ...
