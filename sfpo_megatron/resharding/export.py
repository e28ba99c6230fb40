"""Write the policy as a Hugging Face directory: safetensors, config, tokenizer; whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.families.hf_files import (
    MAX_SHARD_BYTES,
    SafetensorsWriter,
    copy_companions,
)
from sfpo_megatron.outputs.aside import writing
from sfpo_megatron.outputs.exported import RUN_TOOL, exported_names

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

    Files of others that came into `out` since the run began are kept (outputs/aside.py).
    """
    if not is_writer:
        for _ in source:
            pass
        return
    model = Path(model_path)
    adopts = exported_names(model)
    with writing(Path(out), tool=RUN_TOOL, inputs=(model,), overwrite=True, adopts=adopts) as aside:
        SafetensorsWriter(aside, source.metadata(), MAX_SHARD_BYTES).write(source)
        copy_companions(model, aside, dtype)
