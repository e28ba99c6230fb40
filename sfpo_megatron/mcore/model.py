"""A GPTModel from a Hugging Face config: Megatron's own classes, TE spec or local spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import megatron.core.transformer.multi_latent_attention as latent
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from sfpo_megatron.config.rules.low_precision import FORMATS
from sfpo_megatron.config.rules.passed_through import shown
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import InputError
from sfpo_megatron.families.megatron_args import latent_fields
from sfpo_megatron.families.rope import inverse_frequencies
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.device_choices import fuse_weight_gradients
from sfpo_megatron.mcore.experts import canonical_name, choice_biases, expert_fields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def overridden(section: str, cls: type, fields: dict[str, Any], extra: dict[str, Any]) -> Any:
    """`cls(**fields)` with the user's `megatron.<section>` on top; InputError for unknown names and
    for what the class refuses. A field of type torch.dtype takes the dtype's name."""
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    given = dict(extra)
    for name, value in extra.items():
        if name not in known:
            raise InputError(
                f"megatron.{section}.{name}",
                f"a name that {cls.__name__} of this megatron-core does not have",
                "one of its fields",
                "check the spelling",
            )
        if known[name] == torch.dtype and isinstance(value, str):
            given[name] = getattr(torch, value, None)
            if not isinstance(given[name], torch.dtype):
                raise InputError(
                    f"megatron.{section}.{name}",
                    repr(value),
                    "the name of a torch dtype, such as bfloat16",
                    "check the spelling",
                )
    try:
        return cls(**{**fields, **given})
    except Exception as error:  # whatever its own checks raise
        if not extra:
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"megatron.{section}",
            shown(extra),
            f"what {cls.__name__} of this megatron-core takes ({why})",
            "correct the settings",
        ) from error


def transformer_config(
    shape: ModelShape, config: RunConfig, capabilities: Capabilities
) -> TransformerConfig:
    """The model's sizes and the run's layout, then `megatron.transformer` on top."""
    _refuse_what_megatron_lacks(shape, config, capabilities)
    parallel, dtype = config.parallel, DTYPES[config.model.dtype]
    fields = {
        # From 0.19 on latent attention takes its norms' classes by it, where a spec names none.
        "transformer_impl": "transformer_engine" if capabilities.layers == "te" else "local",
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "qk_layernorm": shape.qk_norm,
        "add_qkv_bias": shape.qkv_bias,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        # The packs of a minibatch are equal (batching): every exchange would else send lengths and
        # then wait for the device (`_communicate_shapes`, p2p_communication.py). Interleaved,
        # batched sends of both directions would be mixed up between two stages: one by one.
        "variable_seq_lengths": False,
        "overlap_p2p_comm": parallel.virtual_pipeline is not None,
        "batch_p2p_comm": parallel.virtual_pipeline is None,
        "moe_token_dispatcher_type": "alltoall",  # sends tokens to their experts' ranks alone
        **_window_fields(shape),
        **latent_fields(shape),
        **expert_fields(shape, parallel, capabilities),
        "use_cpu_initialization": not capabilities.cuda,
        "perform_initialization": False,  # every weight is loaded
        **_fusion_fields(shape, capabilities),
    }
    cls = TransformerConfig if shape.mla is None else MLATransformerConfig
    return overridden("transformer", cls, fields, config.megatron.transformer)


def _refuse_what_megatron_lacks(
    shape: ModelShape, config: RunConfig, capabilities: Capabilities
) -> None:
    """Raises ValueError for a run that this installation of Megatron-Core would train wrongly."""
    if config.parallel.context > 1 and capabilities.layers != "te":
        raise ValueError(
            f"parallel.context: found {config.parallel.context}, expected 1 without "
            "TransformerEngine, whose attention alone exchanges keys and values between ranks; "
            "set it to 1"
        )
    for name in FORMATS:
        found = config.megatron.transformer.get(name)
        if found and not (capabilities.cuda and capabilities.layers == "te"):
            raise ValueError(
                f"megatron.transformer.{name}: found {found}, expected null without "
                "TransformerEngine on a GPU, which alone computes in it: layers would silently "
                "compute in model.dtype; remove it"
            )
        if found:
            log_unverified(f"{name.upper()} training")
    if shape.mla and shape.mla.query_rank is None and hasattr(latent, "QKNormConfigResolver"):
        raise ValueError(
            "model.path: found q_lora_rank null, expected a number with this megatron-core, which "
            "would put a norm in front of the queries that the model does not have; take "
            "megatron-core 0.16.1, or a model with latent queries"
        )


def _fusion_fields(shape: ModelShape, capabilities: Capabilities) -> dict[str, bool]:
    """Megatron's fused kernels are CUDA extensions or jit-compiled for CUDA."""
    cuda = capabilities.cuda
    return {
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": cuda,
        "masked_softmax_fusion": cuda,
        "apply_rope_fusion": cuda
        and capabilities.layers == "te"
        and shape.mla is None
        and (shape.rope_scaling is None or shape.rope_scaling.attention_factor == 1),
    }


def _window_fields(shape: ModelShape) -> dict[str, tuple[int, int] | list[int]]:
    """Sliding-window attention: tokens to the left of a query, and the layers that have it."""
    if shape.window is None:
        return {}
    layers = [int(windowed) for windowed in shape.windowed]
    return {"window_size": (shape.window - 1, 0), "window_attn_skip_freq": layers}


def _block_spec(
    config: TransformerConfig, layers: str, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    if layers == "te" and config.multi_latent_attention:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    if layers == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    from sfpo_megatron.mcore.local_spec import local_block_spec

    first = get_transformer_layer_offset(config, vp_stage)
    return local_block_spec(config, range(first, first + get_num_layers_to_build(config, vp_stage)))


def build_chunks(
    shape: ModelShape,
    config: TransformerConfig,
    capabilities: Capabilities,
    *,
    fuse_gradients: bool = False,
) -> list[GPTModel]:
    """This rank's model chunks: one, or one per virtual pipeline stage. Weights are not set.

    Collective where embeddings are tied across pipeline stages (Megatron compares them).
    """
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for index in range(virtual or 1):
        stage = index if virtual else None
        chunks.append(
            GPTModel(
                config,
                _block_spec(config, capabilities.layers, stage),
                vocab_size=shape.padded_vocab_size(config.tensor_model_parallel_size),
                max_sequence_length=shape.max_position,
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=False, vp_stage=stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=False, vp_stage=stage
                ),
                share_embeddings_and_output_weights=shape.tied_embeddings,
                position_embedding_type="rope",
                rotary_base=shape.rope_base,
                vp_stage=stage,
            )
        )
        if shape.rope_scaling is not None and shape.mla is None:  # that scales by itself
            _scale_rope(chunks[-1], shape)
        if fuse_gradients:
            fuse_weight_gradients(chunks[-1].modules())
    return chunks


def _scale_rope(model: GPTModel, shape: ModelShape) -> None:
    """Megatron's own scaling has Llama 3's constants built in; here they are the model's."""
    frequencies = inverse_frequencies(shape.head_dim, shape.rope_base, shape.rope_scaling)
    rope = model.rotary_pos_emb
    rope.inv_freq = rope.inv_freq.new_tensor(frequencies)
    if shape.rope_scaling is not None and shape.rope_scaling.kind == "yarn":
        # SelfAttention multiplies cosines and sines by 0.1 ln(this) + 1 where the config has it.
        model.config.yarn_rotary_scaling_factor = shape.rope_scaling.factor


def unwrapped(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk  # type: ignore[return-value]


def named_params(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(Megatron TE / dist-checkpoint name with the global layer index, param) of this rank; also
    the buffers that are exported (`Rule.frozen`).

    The local spec keeps a layer's norms as modules of their own; Megatron's checkpoints file them
    under the linear they feed (`sharded_state_dict_keys_map`), and so do we. Experts carry their
    global index (families/experts.py).
    """
    for chunk in chunks:
        model = unwrapped(chunk)
        renamed = {}
        for local, layer in enumerate(model.decoder.layers):
            prefix = f"decoder.layers.{local}."
            target = f"decoder.layers.{layer.layer_number - 1}."
            keys_map = layer.submodules_config.sharded_state_dict_keys_map
            for name, _ in (*layer.named_parameters(), *choice_biases(layer)):
                canonical = canonical_name(name, layer.mlp)
                for old, new in keys_map.items():
                    if name.startswith(old):
                        canonical = new + name[len(old) :]
                renamed[prefix + name] = target + canonical
        for name, param in (*model.named_parameters(), *choice_biases(model)):
            yield renamed.get(name, name), param
