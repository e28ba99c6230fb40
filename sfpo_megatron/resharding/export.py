"""Write the policy as a Hugging Face directory: safetensors, config, tokenizer; whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.families.hf_files import (
    MAX_SHARD_BYTES,
    SafetensorsWriter,
    copy_companions,
    replace_directory,
)

if TYPE_CHECKING:
    from sfpo_megatron.resharding.source import MegatronWeightSource


def export_hf(
    source: MegatronWeightSource,
    out: str | Path,
    *,
    model_path: str | Path,
    dtype: str,
    is_writer: bool,
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
    SafetensorsWriter(aside, source.metadata(), MAX_SHARD_BYTES).write(source)
    copy_companions(Path(model_path), aside, dtype)
    replace_directory(aside, out)
