"""te.pytorch.fp8: always off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def is_fp8_calibration() -> bool:
        return False


def fp8_autocast(enabled: bool = True, **_: Any) -> AbstractContextManager[None]:
    if enabled:
        raise NotImplementedError("the TransformerEngine stand-in has no FP8")
    return nullcontext()


def fp8_model_init(enabled: bool = True, **_: Any) -> AbstractContextManager[None]:
    return fp8_autocast(enabled)
