"""The model's config.json as the engine reads it: the same model that the trainer takes it for?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape, read_hf_config
from sfpo_megatron.families.vllm_reading import engine_differs


def engine_reading(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """What vLLM would take otherwise; nothing where no engine runs."""
    if config.debug.train_only is not None:
        return
    path = Path(config.model.path)
    for found, expected, fix in engine_differs(read_hf_config(path), shape):
        yield Problem("model.path", f"{found} in {path / 'config.json'}", expected, fix)
    if (path / "hf_quant_config.json").exists():
        yield Problem(
            "model.path",
            f"hf_quant_config.json in {str(path)!r}, by which the engine would quantize",
            "unquantized weights",
            "use the model before quantization",
        )
