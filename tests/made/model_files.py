"""A tiny model directory with random weights in shards, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made.models import TOKENIZER_JSON
from safetensors.torch import save_file

from sfpo_megatron import cli
from sfpo_megatron.families.shape import model_shape
from sfpo_megatron.families.table import hf_shapes, rules_of

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 37,
}
RUN = {
    "output_dir": "run",
    "model": {"path": "model"},
    "parallel": {"data": 1},
    "data": {"train": [{"source": "reasoning_gym", "task": "chain_sum", "size": 64}]},
}


def random_tensors(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Weights of `CONFIG` with `changes`, by their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    shape = model_shape(CONFIG | changes)
    return {
        name: torch.randn(size, generator=generator)
        for rule in rules_of(shape)
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    }


def write_config(folder: Path, **changes: Any) -> None:
    """config.json and a tokenizer of one word; a run.yaml beside the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
    (folder.parent / "run.yaml").write_text(json.dumps(RUN))


def write_single(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """All in model.safetensors."""
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Half in each of `SHARDS`, and the index; returns its weight_map."""
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(SHARDS, halves, strict=True):
        save_file({n: tensors[n] for n in half}, folder / file, metadata={"format": "pt"})
    weight_map = {n: file for file, half in zip(SHARDS, halves, strict=True) for n in half}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """An index of `weight_map`."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadb"
    b"b8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def checked(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Exit code and stderr of `check`."""
    code = cli.main(["check", "run.yaml", *more])
    return code, capsys.readouterr().err
