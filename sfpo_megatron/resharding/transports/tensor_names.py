"""What is sent: the list of tensors, its check against the engine's checkpoint, its buckets.

vLLM's `load_weights` does not check that it was given everything: a missing half of a fused qkv
leaves the old half in place, silently. So the whole list is compared with the checkpoint that the
engine was started from before the first byte moves. Pure data: no vllm, no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from sfpo_megatron.families.experts import CHOICE_BIAS
from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.families.safetensors_header import ModelFilesError
from sfpo_megatron.families.weight_files import read_tensors

_CHOICE_BIAS = CHOICE_BIAS.hf[0].rpartition(".")[2]
_ALIGN_BYTES = 64  # a cache line; and every dtype's view starts at a multiple of its size


class ManifestError(ValueError):
    """The trainer's tensors are not the ones that the engine's checkpoint has."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Bucket:
    """A run of consecutive tensors that fit into the buffer together."""

    first: int
    """Index in the manifest of its first tensor."""
    offsets: tuple[int, ...]
    """Start of each of its tensors in the buffer, in bytes."""


class Declaration(TypedDict):
    """A manifest in numbers and text, as `Receiver.take_manifest` reads it."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


def declaration(manifest: Sequence[TensorMeta]) -> Declaration:
    """What engines are told of a manifest."""
    return {
        "names": [meta.name for meta in manifest],
        "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in manifest],
        "shapes": [list(meta.shape) for meta in manifest],
    }


def plan_buckets(manifest: Sequence[TensorMeta], bucket_bytes: int) -> tuple[list[Bucket], int]:
    """Cut the manifest into buckets, in order; also the buffer's size.

    The buffer is no larger than the whole model, and never smaller than its largest tensor.
    """
    buckets: list[Bucket] = []
    offsets: list[int] = []
    first = used = buffer_bytes = 0
    for index, meta in enumerate(manifest):
        start = -(-used // _ALIGN_BYTES) * _ALIGN_BYTES
        if offsets and start + meta.num_bytes > bucket_bytes:
            buckets.append(Bucket(first=first, offsets=tuple(offsets)))
            first, offsets, start = index, [], 0
        offsets.append(start)
        used = start + meta.num_bytes
        buffer_bytes = max(buffer_bytes, used)
    if offsets:
        buckets.append(Bucket(first=first, offsets=tuple(offsets)))
    return buckets, buffer_bytes


def read_checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a Hugging Face directory, from the safetensors headers."""
    try:
        tensors = read_tensors(model_dir)
    except ModelFilesError as error:
        raise ManifestError(f"the weights that the engine takes: {error}") from error
    return {name: entry.shape for name, entry in tensors.items()}


def check_manifest(
    manifest: Iterable[TensorMeta],
    expected: dict[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    tied_embeddings: bool,
    left_out: tuple[str, ...] = (),
) -> None:
    """Raise `ManifestError` unless `manifest` is exactly the checkpoint, each tensor once.

    `left_out`: prefixes of names that the engine does not load either. A tied `lm_head.weight` may
    be there or not: vLLM takes the embedding for both.
    """
    expected = {
        name: shape
        for name, shape in expected.items()
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(left_out)
    }
    optional = {"lm_head.weight"} if tied_embeddings else set()
    seen: set[str] = set()
    for meta in manifest:
        if meta.name in seen:
            raise ManifestError(f"{meta.name}: sent twice; a refit sends each tensor once")
        seen.add(meta.name)
        if meta.name not in expected:
            if meta.name in optional:
                continue
            raise ManifestError(
                f"{meta.name}: the trainer would send it, but the engine's checkpoint has no such "
                "tensor; the family's name table does not fit the model the engine runs"
            )
        if meta.shape != expected[meta.name]:
            raise ManifestError(
                f"{meta.name}: found shape {list(meta.shape)}, expected "
                f"{list(expected[meta.name])} as in the engine's checkpoint; full unpadded tensors "
                "are sent"
            )
        wanted = torch.float32 if meta.name.endswith(_CHOICE_BIAS) else dtype
        if meta.dtype != wanted:
            raise ManifestError(
                f"{meta.name}: found dtype {meta.dtype}, expected {wanted}, the engine's; set the "
                "same model.dtype for trainer and engine"
            )
    missing = sorted(expected.keys() - seen - optional)
    if missing:
        raise ManifestError(
            f"{missing[0]}: missing from what the trainer would send ({len(missing)} missing of "
            f"{len(expected)}); vLLM would keep its old values without a word"
        )
