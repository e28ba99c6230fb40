"""A torch_dist checkpoint of the trainer or of Megatron-LM -> a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sfpo_megatron.checkpoints.weight_keys import weight_places
from sfpo_megatron.convert.locate import Located, companions_of, locate
from sfpo_megatron.convert.progress import Progress
from sfpo_megatron.convert.torch_dist import TorchDistReader
from sfpo_megatron.families.hf_files import (
    MAX_SHARD_BYTES,
    SafetensorsWriter,
    TensorMeta,
    copy_companions,
)
from sfpo_megatron.families.operations import split
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import hf_shapes
from sfpo_megatron.outputs.aside import writing

TOOL = "convert_megatron_to_hf"


class MegatronWeights:
    """The Hugging Face tensors of a torch_dist checkpoint, made one Megatron tensor at a time.

    CheckpointError names a key that no rule consumes, a rule without its key, a wrong shape.
    """

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        self._reader, self._shape = TorchDistReader(directory), shape
        sizes = {key: entry.shape for key, entry in self._reader.tensors.items()}
        self._places = weight_places(directory, shape, sizes)

    def specs(self, dtype: torch.dtype | None) -> list[TensorMeta]:
        """Every tensor, in the order of `tensors`."""
        return [
            TensorMeta(
                name=name,
                shape=size,
                dtype=_dtype_of(rule, dtype) or self._reader.tensors[places[0].key].dtype,
            )
            for rule, places in self._places
            for name, size in zip(rule.hf, hf_shapes(rule, self._shape), strict=True)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def tensors(
        self, dtype: torch.dtype | None, progress: Progress | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor); None keeps the checkpoint's dtype."""
        for rule, places in self._places:
            parts = [self._reader.read(place.key, place.index) for place in places]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            for name, part in zip(rule.hf, split(rule, whole, self._shape), strict=True):
                yield name, part.to(_dtype_of(rule, dtype) or part.dtype)
            if progress is not None:
                progress.step(rule.megatron, whole.nbytes)


def _dtype_of(rule: Rule, dtype: torch.dtype | None) -> torch.dtype | None:
    """What is frozen keeps its own."""
    return None if rule.frozen else dtype


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Located:
    """Write `out`, whole or not at all. `hf`: directory of the model's config.json and
    tokenizer, where they are not found beside the checkpoint. `overwrite`: as in `writing`."""
    found = locate(checkpoint)
    companions, shape = companions_of(found, hf)
    inputs = (checkpoint, found.directory, companions)
    with writing(out, tool=TOOL, inputs=inputs, overwrite=overwrite) as aside:
        source = MegatronWeights(found.directory, shape)
        specs = source.specs(dtype)
        copy_companions(companions, aside, _new_dtype(companions, specs[0].dtype))
        writer = SafetensorsWriter(aside, specs, max_shard_bytes)
        writer.write(source.tensors(dtype, Progress(len(source))))
    return found


def _new_dtype(companions: Path, dtype: torch.dtype) -> str | None:
    """What config.json must say from now on; None if it says so already."""
    config = json.loads((companions / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    return None if config.get("dtype", config.get("torch_dtype")) == name else name
