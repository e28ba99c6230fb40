"""Any config.json and index: what `check` takes is the model that transformers makes of it, and its
weights load.

Not exercised: a train step, an engine.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made.readings import FULL, apart, auto_config, ours, theirs
from made.rope_forms import BROKEN, DICTS
from safetensors.torch import save_file

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.tree import DataConfig, DataSource, ModelConfig, RolloutConfig, RunConfig
from sfpo_megatron.families.hf_files import INDEX, HFCheckpoint
from sfpo_megatron.families.shape import ModelShape, UnsupportedModel, model_shape
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


def run_of(folder: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=(DataSource(source="reasoning_gym", task="chain_sum", size=100),)),
        rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=8),
    )


def transformers_tensors(config: Any, family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what its model of this configuration is made of."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    return dict(apart(found, mixtral=family == "mixtral"))


def verdict(config: dict[str, Any], num_files: int) -> str:
    """One config.json through `check`, its shape and a load; AssertionError where they part."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        (model / "tokenizer.json").write_text("{}")
        try:
            shape = model_shape(config)
        except UnsupportedModel as error:
            assert len(str(error).splitlines()) == 1
            with pytest.raises(ConfigError):
                check_config(run_of(folder), file="run.yaml", on_cpu=False)
            return "refused"
        write_weights(model, shape, num_files)
        if "model_type" in config:  # converters take what has none
            reference = auto_config(model, config)
            said = theirs(reference)
            assert ours(shape, said) == said
        try:
            check_config(run_of(folder), file="run.yaml", for_training=True, on_cpu=False)
        except ConfigError:
            return "refused by another rule"
        checkpoint = HFCheckpoint(model, shape)
        expected = transformers_tensors(reference, shape.family)
        loaded = {}
        for rule in rules_of(shape):
            for name, part in zip(rule.hf, checkpoint.parts(rule), strict=True):
                loaded[name] = tuple(part.shape)
        assert loaded == expected
        return "taken"


def examples(num: int) -> Callable[[], Counter[str]]:
    verdicts: Counter[str] = Counter()

    @settings(
        max_examples=num,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(configs(), st.integers(1, 2))
    def run(config: dict[str, Any], num_files: int) -> None:
        verdicts[verdict(config, num_files)] += 1

    def counted() -> Counter[str]:
        run()
        return verdicts

    return counted


@pytest.mark.parametrize("num", [40, pytest.param(500, marks=pytest.mark.full)])
def test_what_check_takes_is_what_transformers_takes_and_loads(num: int) -> None:
    verdicts = examples(num)()
    assert verdicts["taken"] >= num / 5 and verdicts["refused"] >= num / 10
