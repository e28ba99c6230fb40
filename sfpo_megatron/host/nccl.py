"""The version of the NCCL that vLLM's engines load, without torch: standard library only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from importlib import metadata

LIBRARY = "VLLM_NCCL_SO_PATH"
_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")  # torch's


def nccl_version(environ: Mapping[str, str] = os.environ) -> tuple[int, ...] | None:
    """NCCL's version by the library that VLLM_NCCL_SO_PATH names, which is loaded and asked; else
    by the wheel that torch brings. None where neither says."""
    if path := environ.get(LIBRARY):
        code = ctypes.c_int()
        try:
            failed = ctypes.CDLL(path).ncclGetVersion(ctypes.byref(code))
        except (OSError, AttributeError):  # no such library, or of something else
            return None
        # 2.30.5 is 23005; before 2.9 it was four digits.
        major, rest = divmod(code.value, 10_000)
        return None if failed else (major, *divmod(rest, 100))
    for name in _WHEELS:
        try:
            return tuple(int(part) for part in metadata.version(name).split(".")[:3])
        except metadata.PackageNotFoundError:
            continue
    return None
