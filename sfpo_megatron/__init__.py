"""SFPO (Slow-Fast Policy Optimization, arXiv 2510.04072) on Megatron-Core and vLLM.

The names below are imported when they are first used, so that `import sfpo_megatron` costs
nothing on a machine without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "EntropyGate": "sfpo_megatron.gate",
    "SlowSnapshot": "sfpo_megatron.sfpo",
    "sfpo_step": "sfpo_megatron.sfpo",
    "MainParamShards": "sfpo_megatron.mcore.shards",
    "RunConfig": "sfpo_megatron.config.tree",
    "load_config": "sfpo_megatron.config.load",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
