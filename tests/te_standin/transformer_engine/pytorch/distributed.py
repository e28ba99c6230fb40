"""te.pytorch.distributed: names that Megatron imports; recomputation is not in the stand-in."""

from __future__ import annotations

from typing import Any


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}

    def reset(self) -> None:
        self.states_ = {}


def activation_recompute_forward(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("activation recomputation")


def checkpoint(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("activation recomputation")
