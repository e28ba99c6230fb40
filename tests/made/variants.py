"""Any config.json that somebody may have, as a hypothesis strategy, and random weights for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from made.readings import FULL
from made.rope_forms import BROKEN, DICTS
from safetensors.torch import save_file

from sfpo_megatron.families.hf_files import INDEX
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import hf_shapes, rules_of

ODD: list[Any] = ["64", 64.0, True, False, None, -1, 0, [8], {"a": 8}, 1e-5, "silu", float("inf")]
SIZES = {
    "hidden_size": (48, 96, 50),
    "num_attention_heads": (6, 4, 3),
    "num_key_value_heads": (1, 2, 3, 6, 4),
    "head_dim": (8, 16, 32, 15),
    "num_hidden_layers": (1, 3, 4),
    "vocab_size": (101, 64),
    "max_position_embeddings": (64, 96, 512),
    "sliding_window": (4, 200),
    "max_window_layers": (0, 2, 3),
    "num_experts_per_tok": (1, 2, 4),
    "n_group": (1, 2, 4),
    "topk_group": (1, 2),
    "first_k_dense_replace": (0, 1, 2),
    "q_lora_rank": (8, None),
    "rms_norm_eps": (1e-6, 0.1),
    "tie_word_embeddings": (True, False),
    "use_sliding_window": (True, False),
    "norm_topk_prob": (True, False),
    "rope_theta": (1e4, 5000),
}
MORE: dict[str, tuple[Any, ...]] = {
    "num_experts": (4, 2),
    "num_local_experts": (4, 2),
    "num_mtp_layers": (0, 1),
    "original_max_position_embeddings": (32, 64),
    "partial_rotary_factor": (1.0, 0.5),
    "layer_types": (["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"]),
    "bias": (True, False),
    "quantization_config": ({"quant_method": "fp8"},),
    "auto_map": ({"AutoConfig": "configuration_own.OwnConfig"},),
    "model_type": ("llama", "qwen2"),
    "architectures": (["LlamaForCausalLM"], ["OwnForCausalLM"], []),
    "max_seq_len": (40, 4000),
    "dtype": ("bfloat16", "int3"),
    "eos_token_id": (1, [1, 2], 4000),
    "attention_bias": (True,),
    "hidden_act": ("gelu",),
    "initializer_range": (0.1, 1),
    "decoder_sparse_step": (2,),
    "mlp_only_layers": ([0],),
}


def _change(draw: st.DrawFn, config: dict[str, Any]) -> None:
    kind = draw(st.sampled_from(["size", "size", "size", "drop", "rope", "rope", "odd", "more"]))
    if kind == "size":
        key = draw(st.sampled_from([key for key in SIZES if key in config]))
        config[key] = draw(st.sampled_from(SIZES[key]))
    elif kind == "drop":
        del config[draw(st.sampled_from([key for key in config if key != "architectures"]))]
    elif kind == "odd":
        config[draw(st.sampled_from(sorted(config)))] = draw(st.sampled_from(ODD))
    elif kind == "more":
        key = draw(st.sampled_from(sorted(MORE)))
        config[key] = draw(st.sampled_from(MORE[key]))
    else:
        key = draw(st.sampled_from(["rope_parameters", "rope_scaling"]))
        broken = draw(st.sampled_from([False, False, False, True]))
        forms: dict[str, Any] = BROKEN if broken else DICTS
        config[key] = forms[draw(st.sampled_from(sorted(forms)))]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    config = dict(FULL[draw(st.sampled_from(sorted(FULL)))])
    if "max_window_layers" in config:  # else vLLM refuses, and with it `check`, nearly all
        config["max_window_layers"] = draw(st.sampled_from([0, 0, 0, 2]))
    for _ in range(draw(st.integers(0, 4))):
        _change(draw, config)
    return config


def write_weights(folder: Path, shape: ModelShape, num_files: int) -> None:
    tensors = {
        name: torch.randn(size, dtype=torch.bfloat16)
        for rule in rules_of(shape)
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    }
    names = sorted(tensors)
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = names[number::num_files]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
