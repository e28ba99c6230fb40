"""What only DeepSeek-V3 has: multi-token prediction layers, biases that nobody trains.

There and back, layers that differ: test_convert.py. Megatron on the other side: tests/dist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made.hf import make_hf
from safetensors.torch import load_file, save_file

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.convert.to_hf import megatron_to_hf
from sfpo_megatron.convert.to_megatron import hf_to_megatron
from sfpo_megatron.families.shape import read_hf_config

ONE = torch.ones(1)
KIND: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "tie_word_embeddings": False,
}


def test_multi_token_prediction_layers_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said in a line; what is written has none, in name too. A layer too many is still an error."""
    source = make_hf(tmp_path / "hf", **KIND, num_nextn_predict_layers=1)
    original = load_file(source / "model.safetensors")
    extra = {"model.layers.3.eh_proj.weight": torch.ones(2), "model.layers.3.enorm.weight": ONE}
    save_file({**original, **extra}, source / "mtp.safetensors")
    (source / "model.safetensors").unlink()
    hf_to_megatron(source, tmp_path / "megatron", ParallelConfig())
    assert "2 tensors of multi-token prediction layers are left out" in caplog.text
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == original.keys()
    assert read_hf_config(tmp_path / "back")["num_nextn_predict_layers"] == 0
    save_file({**original, "model.layers.4.enorm.weight": ONE}, source / "mtp.safetensors")
    with pytest.raises(ValueError, match=r"unknown tensors .* model.layers.4.enorm.weight"):
        hf_to_megatron(source, tmp_path / "again", ParallelConfig())


def test_frozen_biases_keep_their_dtype(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", **KIND)
    original = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    original[name] = original[name].float() + 1e-3  # no bf16 number
    save_file(original, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "megatron", ParallelConfig())
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.float16)
    back = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(back[name], original[name]) and back[name].dtype == torch.float32
    assert back["model.norm.weight"].dtype == torch.float16
