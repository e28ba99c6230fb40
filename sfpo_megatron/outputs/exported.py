"""Names of the files in an exported Hugging Face directory. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from sfpo_megatron.outputs.owned import MARKER

RUN_TOOL = "sfpo-megatron run"
"""The name in the marker of RUN/hf."""
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")
_WRITTEN = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def companions(source: Path) -> list[Path]:
    """Everything beside the weights of `source` that loads with them; links to nothing too."""
    return [
        file
        for file in sorted(source.iterdir())
        if (file.is_file() or (file.is_symlink() and not file.exists()))
        and file.name != MARKER
        and not any(file.match(pattern) for pattern in _WEIGHT_FILES)
    ]


def exported_names(model: Path) -> Callable[[str], bool]:
    """Whether the export of a run of `model` writes a file of this name."""
    copied = {file.name for file in companions(model)} if model.is_dir() else set()
    return lambda name: name in copied or any(fnmatch(name, pattern) for pattern in _WRITTEN)
