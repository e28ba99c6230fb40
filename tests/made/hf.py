"""Hugging Face directories with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from made.configs import AIW
from made.models import OF_EXPERTS, TINY

from sfpo_megatron.families.hf_files import SafetensorsWriter, TensorMeta
from sfpo_megatron.families.shape import model_shape
from sfpo_megatron.families.table import hf_shapes, rules_of
from tools import make_tiny_model


def make_hf(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random model directory of 101 tokens, and the files that travel along."""
    architecture = changes.get("architectures", TINY["architectures"])[0]
    config = {**TINY, **OF_EXPERTS.get(architecture, {}), **changes}
    config["dtype"] = str(dtype).removeprefix("torch.")
    shape = model_shape(config)
    specs = [
        TensorMeta(name=name, shape=size, dtype=dtype)
        for rule in rules_of(shape)
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    ]
    random = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    SafetensorsWriter(folder, specs, 1 << 30).write(
        (spec.name, torch.randn(spec.shape, generator=random).to(dtype)) for spec in specs
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    return folder


def make_tiny(out: Path, *more: str) -> Path:
    """A model with its tokenizer, as tools/make_tiny_model.py makes it for the task of `AIW`."""
    assert make_tiny_model.main(["--out", str(out), "--config", str(AIW), *more]) == 0
    return out
