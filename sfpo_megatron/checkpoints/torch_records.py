"""A reader for `.metadata` of a torch_dist checkpoint that makes torch's records and nothing else.

The file is a pickle, which may name any code. Upstream's reader makes whatever it names, so a file
is read here before upstream sees it. This module does not import torch; unpickling does."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from sfpo_megatron.checkpoints.store import CheckpointError

_RECORDS: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "builtins": ("set", "frozenset"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and "." not in name:
            found = super().find_class(module, name)
            if type(found).__qualname__ == "dtype":
                return found
        raise pickle.UnpicklingError(f"found {module}.{name}")


def read_metadata(path: Path) -> Any:
    """The `torch.distributed.checkpoint.Metadata` in a file; CheckpointError if it names anything
    but its records."""
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        if type(found).__name__ != "Metadata":
            raise pickle.UnpicklingError(f"found {type(found).__name__}")
    except Exception as error:  # a flipped byte is another opcode, which runs into anything
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: {why}, expected only the records of a torch_dist checkpoint; do not load "
            "checkpoints of unknown origin, or save it again"
        ) from error
    return found


def tensor_sizes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a torch_dist directory. CheckpointError as of
    `read_metadata`."""
    entries = read_metadata(checkpoint / ".metadata").state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if hasattr(entry, "size")}
