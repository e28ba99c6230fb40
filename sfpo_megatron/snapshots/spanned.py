"""A snapshot whose two steps are seen in a trace."""

from __future__ import annotations

from torch import Tensor

from sfpo_megatron.host.spans import span
from sfpo_megatron.sfpo import Snapshot


class SpannedSnapshot:
    """Another snapshot, with a span around each step."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def take(self) -> None:
        with span("snapshot"):
            self._snapshot.take()

    def reposition(self, alpha: float) -> None:
        with span("reposition"):
            self._snapshot.reposition(alpha)

    def buffers(self) -> list[Tensor]:
        return self._snapshot.buffers()
