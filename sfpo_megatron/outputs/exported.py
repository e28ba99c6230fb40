"""Names of the files in an exported Hugging Face directory. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from sfpo_megatron.outputs.owned import MARKER

RUN_TOOL = "sfpo-megatron run"
"""The name in the marker of RUN/hf."""
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".ot"),
)
"""Ends of the names of files with weights of whatever framework, or with an optimizer's state."""
_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates that have names, as transformers saves them (`tool_use`...)."""
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
        for file in (*sorted(source.iterdir()), *sorted((source / _TEMPLATES).glob("*.jinja")))
        if file.name != MARKER and not file.name.removesuffix(".index.json").endswith(WEIGHTS)
    ]


def exported_names(model: Path) -> Callable[[str], bool]:
    """Whether the export of a run of `model` writes a file of this name, relative to its folder."""
    copied = set()
    if model.is_dir():
        copied = {str(file.relative_to(model)) for file in companions(model)}
    return lambda name: name in copied or any(fnmatch(name, pattern) for pattern in _WRITTEN)
