"""Names of the files in an exported Hugging Face directory. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from sfpo_megatron.outputs.owned import MARKER

RUN_TOOL = "sfpo-megatron run"
"""The name in the marker of RUN/hf."""
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")
_WRITTEN = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def companions(source: Path) -> list[Path]:
    """Everything beside the weights of `source` that loads with them."""
    return [file for file in _beside_weights(source) if file.is_file()]


def dead_links(source: Path) -> list[str]:
    """Names of what would be among the companions of `source` if its links led anywhere."""
    found = _beside_weights(source)
    return [file.name for file in found if file.is_symlink() and not os.path.exists(file)]


def _beside_weights(source: Path) -> list[Path]:
    return [
        file
        for file in sorted(source.iterdir())
        if file.name != MARKER and not any(file.match(pattern) for pattern in _WEIGHT_FILES)
    ]


def exported_names(model: Path) -> Callable[[str], bool]:
    """Whether the export of a run of `model` writes a file of this name."""
    copied = {file.name for file in companions(model)} if model.is_dir() else set()
    return lambda name: name in copied or any(fnmatch(name, pattern) for pattern in _WRITTEN)
