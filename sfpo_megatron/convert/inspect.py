"""What a directory of weights is, and how two of them differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfpo_megatron.checkpoints import manifest
from sfpo_megatron.checkpoints.store import RUN_STATE, CheckpointError
from sfpo_megatron.checkpoints.weight_keys import weights
from sfpo_megatron.convert.locate import Located, companions_of, locate
from sfpo_megatron.convert.to_hf import MegatronWeights
from sfpo_megatron.convert.torch_dist import TorchDistReader
from sfpo_megatron.families.hf_files import HFCheckpoint
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.families.table import rules_of
from sfpo_megatron.families.weight_files import has_weights, weight_files

_LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data")


# --- what it is -------------------------------------------------------------------------------


def describe(path: Path) -> list[tuple[str, str]]:
    """(label, text) of a Hugging Face directory or a torch_dist checkpoint. Reads no weights, but
    every byte once where a manifest says what it must be."""
    if has_weights(path):
        return _describe_hf(path)
    found = locate(path)
    reader = TorchDistReader(found.directory)
    names = {"native": "checkpoint of the trainer", "megatron_lm": "Megatron-LM checkpoint"}
    lines = [("what", f"{names[found.kind]} (torch_dist)"), ("directory", str(found.directory))]
    lines += _describe_common(reader)
    model = {key: reader.tensors[key] for key in weights(reader.tensors)}
    other = {key: entry for key, entry in reader.tensors.items() if key not in model}
    lines.append(("weights", _amount(model.values())))
    if other:
        lines.append(("optimizer", _amount(other.values())))
    if reader.objects:
        lines.append(("other objects", str(len(reader.objects))))
    lines += _describe_run_state(found)
    lines += _describe_manifest(found.directory)
    size = sum(file.stat().st_size for file in found.directory.rglob("*") if file.is_file())
    lines.append(("on disk", f"{size / 2**20:,.1f} MiB"))
    return lines


def _describe_hf(path: Path) -> list[tuple[str, str]]:
    shape = model_shape(read_hf_config(path))
    source = HFCheckpoint(path, shape)
    dtypes = Counter(str(d).removeprefix("torch.") for d in source.dtypes().values())
    size = weight_files(path).num_bytes()
    return [
        ("what", f"Hugging Face directory ({shape.family})"),
        ("directory", str(path)),
        ("dtypes", ", ".join(f"{n} x {name}" for name, n in dtypes.items())),
        ("on disk", f"{size / 2**20:,.1f} MiB"),
    ]


def _describe_common(reader: TorchDistReader) -> list[tuple[str, str]]:
    try:
        common = reader.common()
    except CheckpointError as error:
        return [("common.pt", str(error))]
    lines = []
    if "iteration" in common:
        lines.append(("step", str(common["iteration"])))
    arguments = common.get("args")
    if arguments is not None:
        sizes = {name: getattr(arguments, f"{name}_model_parallel_size", None) for name in _LAYOUT}
        sizes["context"] = getattr(arguments, "context_parallel_size", None)
        text = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
        lines.append(("saved under", text or "not recorded"))
    return lines


def _describe_run_state(found: Located) -> list[tuple[str, str]]:
    """The trainer's own JSON beside the tensors, gate included."""
    file = found.directory / RUN_STATE
    if not file.is_file():
        return []
    try:
        state: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        return [("run state", f"{file}: found no JSON object ({error}); the run cannot go on")]
    return [
        (f"run state: {name}", text if len(text) <= 200 else f"{text[:200]}...")
        for name, text in ((name, json.dumps(value)) for name, value in state.items())
    ]


def _describe_manifest(directory: Path) -> list[tuple[str, str]]:
    if not (directory / manifest.NAME).is_file():
        return [("manifest", "none")]
    try:
        problems = manifest.faults(directory)
    except OSError as error:
        problems = [f"{error.filename}: found {error.strerror}, expected a file that can be read"]
    return [("manifest", "holds" if not problems else "; ".join(problems))]


def _amount(entries: Any) -> str:
    entries = list(entries)
    numbers = sum(entry.num_bytes // entry.dtype.itemsize for entry in entries)
    size = sum(entry.num_bytes for entry in entries)
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
    return (
        f"{numbers:,} numbers in {len(entries)} tensors, {size / 2**20:,.1f} MiB, "
        f"{', '.join(dtypes)}"
    )


# --- how two differ ---------------------------------------------------------------------------


def differences(left: Path, right: Path, *, hf: Path | None = None) -> Iterator[str]:
    """One line for each tensor that is not equal, bit for bit; compared by Hugging Face name. `hf`:
    a directory with the model's config.json, where it is not found beside a checkpoint."""
    left_tensors, right_tensors = _tensors(left, hf), _tensors(right, hf)
    # Both come in the order of the family's table; a tensor at a time is in memory on each side.
    nothing = ("no further tensor", torch.empty(0))
    for (name, a), (other, b) in zip_longest(left_tensors, right_tensors, fillvalue=nothing):
        if name != other:
            raise CheckpointError(
                f"found {name} in {left} and {other} in {right}, expected the same tensors; "
                "compare two checkpoints of one model"
            )
        if a.dtype != b.dtype or a.shape != b.shape:
            yield f"{name}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            apart = (a.double() - b.double()).abs()
            count = int(apart.ne(0).sum())
            yield f"{name}: {count:,} of {a.numel():,} differ, by {apart.max():.3g} at most"


def _tensors(path: Path, hf: Path | None) -> Iterator[tuple[str, Tensor]]:
    if has_weights(path):
        shape = model_shape(read_hf_config(path))
        source = HFCheckpoint(path, shape)
        return (
            (name, part)
            for rule in rules_of(shape)
            for name, part in zip(rule.hf, source.parts(rule), strict=True)
        )
    found = locate(path)
    _, shape = companions_of(found, hf)
    return MegatronWeights(found.directory, shape).tensors(None)
