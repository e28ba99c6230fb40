"""TEMPORARY until merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfpo_megatron.tracking.sinks import Tracker

__all__ = ["NoTracker", "Tracker"]


class NoTracker:
    def log(self, metrics: Mapping[str, Any]) -> None: ...
    def progress(self, text: str) -> None: ...
    def close(self) -> None: ...
