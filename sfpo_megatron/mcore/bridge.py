"""Families outside our tables, by NVIDIA's Megatron-Bridge if it is installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sfpo_megatron.families.shape import UnsupportedModel

log = logging.getLogger(__name__)


def _auto_bridge(error: UnsupportedModel) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError:
        raise UnsupportedModel(
            error.found,
            error.expected,
            f"{error.fix}, or install Megatron-Bridge, which converts other models",
        ) from error
    log.warning("converting with Megatron-Bridge: unverified here, see docs/verified.md")
    return AutoBridge


def bridge_to_megatron(hf: Path, out: Path, error: UnsupportedModel) -> None:
    """Convert the model that `error` refuses. UnsupportedModel without Megatron-Bridge."""
    _auto_bridge(error).import_ckpt(str(hf), str(out))


def bridge_to_hf(checkpoint: Path, hf: Path, out: Path, error: UnsupportedModel) -> None:
    """Convert back to Hugging Face; `hf` is the model's own directory."""
    bridge = _auto_bridge(error).from_hf_pretrained(str(hf))
    bridge.export_ckpt(str(checkpoint), str(out))
