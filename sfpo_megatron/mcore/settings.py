"""Megatron's configs of a run: its transformer's, DDP's and optimizer's, `megatron.*` on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import megatron.core.transformer.multi_latent_attention as latent
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from sfpo_megatron.config.rules.low_precision import FORMATS
from sfpo_megatron.config.rules.passed_through import shown
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import InputError
from sfpo_megatron.families.megatron_args import latent_fields
from sfpo_megatron.families.shape import ModelShape, model_shape, read_hf_config
from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.experts import expert_fields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hold_to_megatron(config: RunConfig, capabilities: Capabilities) -> None:
    """Make all three and drop them: what their classes alone refuse is said before anything is
    written or an engine starts. InputError as `overridden`."""
    shape = model_shape(read_hf_config(config.model.path))
    transformer = transformer_config(shape, config, capabilities)
    rates = {"lr": config.train.optimizer.lr, "min_lr": 0.0}
    optimizer_config(config, transformer, ddp_config(config), rates)


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


def ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    """How gradients are reduced and params are gathered, then `megatron.ddp` on top."""
    fields = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True}
    return overridden("ddp", DistributedDataParallelConfig, fields, config.megatron.ddp)


def optimizer_config(
    config: RunConfig,
    transformer: TransformerConfig,
    ddp: DistributedDataParallelConfig,
    rates: Mapping[str, float],
) -> OptimizerConfig:
    """Adam, then `megatron.optimizer` on top. `rates`: lr and min_lr, the schedule's."""
    section = config.train.optimizer
    fields = {
        "optimizer": "adam",
        **rates,
        "adam_beta1": section.betas[0],
        "adam_beta2": section.betas[1],
        "adam_eps": section.eps,
        "weight_decay": section.weight_decay,
        "clip_grad": section.clip_grad,
        "params_dtype": transformer.params_dtype,
        "bf16": transformer.bf16,
        "fp16": transformer.fp16,
        "use_distributed_optimizer": ddp.use_distributed_optimizer,
        "overlap_param_gather": ddp.overlap_param_gather,
        # A constant scale of 1 turns on Megatron's own check: a step with non-finite gradients is
        # skipped on every rank instead of writing NaN into the weights. fp16 needs a dynamic scale;
        # from Megatron's default start of 2^32 it would skip the first 16 steps to find its way.
        "loss_scale": None if transformer.fp16 else 1.0,
        "initial_loss_scale": 2.0**16,
    }
    given = dict(config.megatron.optimizer)
    if not given.get("loss_scale"):
        # Null and 0, Megatron's words for no constant scale, would take the check away as well.
        given.pop("loss_scale", None)
    return overridden("optimizer", OptimizerConfig, fields, given)
