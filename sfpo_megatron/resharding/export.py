"""Write the policy as a Hugging Face directory: safetensors, config, tokenizer; whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sfpo_megatron.families.hf_files import MAX_SHARD_BYTES, copy_companions, replace_directory


def export_hf(
    source: Iterable[tuple[str, Tensor]],
    out: str | Path,
    *,
    model_path: str | Path,
    dtype: str,
    is_writer: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `source` to `out`, with config.json, tokenizer, chat template and generation config of
    `model_path`. Every rank calls it (iterating `source` is collective); one writes.

    Written aside and renamed at the end; an earlier `out` goes only then.
    """
    if not is_writer:
        for _ in source:
            pass
        return
    out = Path(out)
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shards = _write_shards(source, aside, max_shard_bytes)
    _name_shards(aside, shards)
    copy_companions(Path(model_path), aside, dtype)
    replace_directory(aside, out)


def _write_shards(
    source: Iterable[tuple[str, Tensor]], directory: Path, max_bytes: int
) -> list[list[tuple[str, int]]]:
    """Stream into numbered files; returns each file's (name, bytes) entries."""
    shards: list[list[tuple[str, int]]] = []
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(waiting, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append([(name, tensor.nbytes) for name, tensor in waiting.items()])
        waiting.clear()

    for name, tensor in source:
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > max_bytes:
            flush()
        # A copy of its own: safetensors refuses views that share storage (qkv, gate-up halves).
        waiting[name] = tensor.detach().to("cpu", copy=True).contiguous()
    flush()
    return shards


def _name_shards(directory: Path, shards: list[list[tuple[str, int]]]) -> None:
    """Hugging Face's file names, and the index where there is more than one file."""
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, entries in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / name)
        weight_map.update({tensor: name for tensor, _ in entries})
    total = sum(size for entries in shards for _, size in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
