"""What a rule finds: a key, what is there, what should be, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of a rule."""

    key: str
    found: str
    expected: str
    fix: str
    level: Literal[
        "error",
        "error_when_training",
        "error_here",
        "error_when_filling",
        "error_when_writing",
        "error_when_rewarding",
        "warning",
    ] = "error"
    """What it stops. error_here: what this machine lacks, its libraries, memory or devices, stops a
    run that starts on it, and none that is on its way to others."""
    cause: Exception | None = None
    """What was raised where a file was read: a file system may be back by another start."""

    @property
    def message(self) -> str:
        """What follows the key."""
        return f"found {self.found}, expected {self.expected}; {self.fix}"
