"""A Hugging Face model directory: tensors read lazily, written one by one, and its other files."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.weight_files import INDEX, SINGLE, weight_files
from sfpo_megatron.families.weight_names import check_tensors, not_trained
from sfpo_megatron.outputs.exported import companions, dead_links
from sfpo_megatron.types import Json

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 1024**3
"""A new file starts before a tensor would push one past this (transformers' own default)."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of the dtypes that weights have."""


class HFCheckpoint:
    """The tensors of a Hugging Face directory by name, read lazily; checked against the model."""

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        self._directory = Path(directory)
        self._shape = shape
        files = weight_files(self._directory)
        self._entries = files.tensors()
        check_tensors(self._directory, self._entries, shape)
        if files.left_alone:
            log.warning("%s: not read: %s", self._directory, ", ".join(files.left_alone))
        if left_out := not_trained(self._entries, shape):
            log.warning(
                "%s: %d tensors of multi-token prediction layers are left out: they are not "
                "trained, and what is written has none",
                self._directory,
                len(left_out),
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._directory / self._entries[name].file, framework="pt") as handle:
            return handle.get_tensor(name)

    def parts(self, rule: Rule) -> list[torch.Tensor]:
        """The Hugging Face parts of `rule`."""
        return [self[name] for name in rule.hf]

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor, without reading any."""
        return {n: DTYPES[e.dtype] for n, e in self._entries.items() if e.dtype in DTYPES}


@dataclass(kw_only=True, frozen=True, slots=True)
class TensorMeta:
    """One full (unsharded) tensor under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Tensors into safetensors files in the order of `specs`, each on disk before the next is made.

    The format wants every size in a file's head, so they must be known before the first byte.
    """

    def __init__(self, directory: Path, specs: Sequence[TensorMeta], max_bytes: int) -> None:
        self._directory = directory
        self._files: list[list[TensorMeta]] = []
        size = 0
        for spec in specs:
            if not self._files or size + spec.num_bytes > max_bytes:
                self._files.append([])
                size = 0
            self._files[-1].append(spec)
            size += spec.num_bytes

    def names(self) -> list[str]:
        """File names, as transformers numbers them."""
        total = len(self._files)
        if total == 1:
            return [SINGLE]
        return [f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """All of them. ValueError if one is not what its spec says."""
        source = iter(tensors)
        for name, specs in zip(self.names(), self._files, strict=True):
            with (self._directory / name).open("wb") as file:
                file.write(_header(specs))
                for spec in specs:
                    found, tensor = next(source)
                    if (found, tuple(tensor.shape), tensor.dtype) != (
                        *(spec.name, spec.shape, spec.dtype),
                    ):
                        raise ValueError(f"{found}: found {tensor.shape}, expected {spec}")
                    flat = tensor.detach().cpu().contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
        if len(self._files) > 1:
            weight_map = {
                spec.name: name
                for name, specs in zip(self.names(), self._files, strict=True)
                for spec in specs
            }
            total = sum(spec.num_bytes for specs in self._files for spec in specs)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(specs: Sequence[TensorMeta]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        end = start + spec.num_bytes
        header[spec.name] = {
            "dtype": names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def copy_companions(source: Path, out: Path, dtype: str | None) -> None:
    """Everything beside the weights that loads with them: config.json (with `dtype`, if given, and
    without multi-token prediction), tokenizer, chat template, generation config."""
    for file in companions(source):
        copy = out / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    if left_out := dead_links(source):
        log.warning("%s: left out, links to nothing: %s", source, ", ".join(left_out))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if dtype is None and not config.get("num_nextn_predict_layers"):
        return
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # see HFCheckpoint
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
