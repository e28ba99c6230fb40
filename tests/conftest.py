"""Shared by all tests: one OpenMP thread, and a small model directory without weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks.common
sys.path.insert(0, str(Path(__file__).parent))  # made
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch

MODEL_JSON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 101,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """`model_dir(hidden_size=64, ...)` -> a directory as `check` reads it; None drops a key."""

    def make(*, weights: bool = True, tokenizer: bool = True, **changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        config = {k: v for k, v in (MODEL_JSON | changes).items() if v is not None}
        name = SUPPORTED_ARCHITECTURES.get(config.get("architectures", [""])[0])
        if name is not None:
            config.setdefault("model_type", name)
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            (folder / "model.safetensors").write_bytes(b"")
        if tokenizer:
            (folder / "tokenizer.json").write_text("{}")
        return folder

    return make
