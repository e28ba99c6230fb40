"""A GPTModel from a Hugging Face config: Megatron's own classes, TE spec or local spec."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from sfpo_megatron.families.rope import inverse_frequencies
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.device_choices import fuse_weight_gradients
from sfpo_megatron.mcore.experts import canonical_name, choice_biases


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
    scaling = shape.rope_scaling if shape.mla is None else None  # latent attention scales by itself
    if scaling is not None and scaling.kind == "yarn":
        # SelfAttention multiplies cosines and sines by 0.1 ln(this) + 1 where the config has it:
        # looked up in each forward, from 0.19 on once, where the layer is made.
        config.yarn_rotary_scaling_factor = scaling.factor
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
        if scaling is not None:
            _scale_rope(chunks[-1], shape)
        if fuse_gradients:
            fuse_weight_gradients(chunks[-1].modules())
    return chunks


def _scale_rope(model: GPTModel, shape: ModelShape) -> None:
    """Megatron's own scaling has Llama 3's constants built in; here they are the model's."""
    frequencies = inverse_frequencies(shape.head_dim, shape.rope_base, shape.rope_scaling)
    rope = model.rotary_pos_emb
    rope.inv_freq = rope.inv_freq.new_tensor(frequencies)


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
