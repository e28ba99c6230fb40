"""Megatron's logits equal transformers', for every family, layout, packed and alone.

Not exercised here: context parallelism, CUDA kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from comparisons import check_logits
from harness import (
    EP2,
    EP2PP2,
    PP2,
    SP2,
    SP2EP2,
    TP1,
    TP2,
    TP2PP2,
    VPP2,
    on_ranks,
)
from made.bits import all_same_bits, same_bits
from references import LATENT_MODELS, MODELS, MOE_MODELS, MORE_MODELS, VOCAB_SIZE
from safetensors.torch import load_file

if TYPE_CHECKING:
    from workbench import Workbench


@on_ranks(TP1, TP2, SP2, PP2, TP2PP2, model=MODELS)
def test_logits_equal_transformers(bench: Workbench, model: str) -> None:
    """fp32, within 1e-4 of the largest logit (measured: about 1e-6)."""
    check_logits(bench, model, 1e-4)


@on_ranks(
    *(TP1, EP2, PP2, VPP2, SP2EP2, EP2PP2),
    full=[
        *(f"{layout}-{model}" for layout in ("PP2xVPP2", "TP2+SPxEP2") for model in MOE_MODELS[1:]),
        *(f"DP2xEP2xPP2-{model}" for model in MOE_MODELS[1:]),
    ],
    model=MOE_MODELS,
)
def test_moe_logits_equal_transformers(bench: Workbench, model: str) -> None:
    """Experts on one rank and over two; every rank gives its own tokens, and gets them back."""
    check_logits(bench, model, 1e-4)


@on_ranks(
    *(TP1, EP2, PP2, VPP2, SP2EP2, EP2PP2),
    only=[
        *(f"TP1-{model}" for model in LATENT_MODELS),
        *(f"{layout}-deepseek_untied" for layout in ("DP2xEP2", "PP2", "TP2+SPxEP2")),
    ],
    model=LATENT_MODELS,
)
def test_latent_attention_logits_equal_transformers(bench: Workbench, model: str) -> None:
    """Tensor parallelism is with sequence parallelism: Megatron trains experts in no other way."""
    check_logits(bench, model, 1e-4)


@on_ranks(TP1, TP2, SP2, PP2, TP2PP2, only=["TP1-qwen3yarn_tied"], model=MORE_MODELS)
def test_windows_and_scaled_rope(bench: Workbench, model: str) -> None:
    """In `make test` test_convert.py holds most of these at TP2 x PP2; not yarn, whose attention
    factor is handed to Megatron by a name that releases read at other times."""
    check_logits(bench, model, 1e-4)


@on_ranks(VPP2, model=["qwen2_tied", "llama_untied"])
def test_logits_under_the_interleaved_schedule(bench: Workbench, model: str) -> None:
    check_logits(bench, model, 1e-4)


@on_ranks(PP2, model=["llama_tied"])
def test_logits_of_stages_of_different_sizes(bench: Workbench, model: str) -> None:
    """Three layers and one; every weight comes back under its own layer's name."""
    stages = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
    check_logits(bench, model, 1e-4, transformer=stages)
    policy = bench.policy(model, transformer=stages)
    layers = len(policy.chunks[0].module.decoder.layers)
    assert layers == (1 if policy.layout.is_last_stage else 3)
    original = load_file(bench.directory / model / "model.safetensors")
    exported = bench.hf_weights(policy)
    assert exported.keys() == original.keys()
    assert all_same_bits(exported.values(), (original[name] for name in exported))


@on_ranks(TP1, TP2, model=["qwen2_tied", "qwen3_untied"])
def test_logits_bf16(bench: Workbench, model: str) -> None:
    """bf16 keeps 8 bits: 4 layers stay within 4% of the largest logit of the fp32 model."""
    check_logits(bench, model, 0.04, dtype="bfloat16")


@on_ranks(TP2, model=["qwen2_tied", "llama_untied"])
def test_vocabulary_padding_is_cut_at_export(bench: Workbench, model: str) -> None:
    """101 rows are 2 x 51 in Megatron; export gives the file's 101 rows back, bit for bit, and
    every other tensor too. Padding rows are zero and stay so while training."""
    from sfpo_megatron.mcore.model import named_params

    policy = bench.policy(model)
    original = load_file(bench.directory / model / "model.safetensors")
    exported = bench.hf_weights(policy)
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert exported[name].shape == tensor.shape, name
        assert same_bits(exported[name], tensor), name
    bench.one_pass(policy, bench.prepared(policy))()
    for name, param in named_params(policy.chunks):
        if "word_embeddings" in name or "output_layer" in name:
            assert param.shape[0] == 51
            padding = param[VOCAB_SIZE - 51 * policy.layout.tensor_rank :]
            assert padding.shape[0] == policy.layout.tensor_rank
            assert not padding.any(), name
