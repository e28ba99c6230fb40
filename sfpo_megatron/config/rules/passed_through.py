"""What is handed to vLLM and Megatron-Core as it is: names that they have, values of their types,
and nothing that has a key of its own. No torch: the installed packages' sources are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sfpo_megatron.config.names import did_you_mean
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.config.upstream import accepts, fields_of
from sfpo_megatron.errors import shortened
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.types import Json

_CORE = "megatron.core"
CLASSES: dict[str, tuple[str, str]] = {
    "rollout.engine_args": ("vllm.engine.arg_utils", "AsyncEngineArgs"),
    # Latent attention's, which has all fields of the others.
    "megatron.transformer": (f"{_CORE}.transformer.transformer_config", "MLATransformerConfig"),
    "megatron.ddp": (
        f"{_CORE}.distributed.distributed_data_parallel_config",
        "DistributedDataParallelConfig",
    ),
    "megatron.optimizer": (f"{_CORE}.optimizer.optimizer_config", "OptimizerConfig"),
}
"""Section -> module and class whose fields its keys are."""

_OWNED_BY_US: dict[str, dict[str, str]] = {
    "rollout.engine_args": {
        "model": "model.path",
        "tokenizer": "model.path",
        "dtype": "model.dtype",
        "seed": "seed",
        "tensor_parallel_size": "rollout.tensor_parallel",
        "gpu_memory_utilization": "rollout.gpu_memory_utilization",
        "revision": "model.path: a directory has one",
        "hf_config_path": "model.path: the trainer reads the same config.json",
        "data_parallel_size": "rollout.num_engines",
        "pipeline_parallel_size": "rollout.tensor_parallel: an engine has as many devices",
        "weight_transfer_config": "refit.transport",
        "enable_sleep_mode": "rollout.placement: colocated engines sleep, dedicated ones do not",
        "quantization": "rollout.quantization: of the others, some read scales that no refit sends "
        "and would be silently wrong",
    },
    "megatron.transformer": {
        "tensor_model_parallel_size": "parallel.tensor",
        "pipeline_model_parallel_size": "parallel.pipeline",
        "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
        "context_parallel_size": "parallel.context",
        "expert_model_parallel_size": "parallel.expert",
        "expert_tensor_parallel_size": "parallel.expert_tensor",
        "sequence_parallel": "parallel.sequence",
        **dict.fromkeys(
            (
                *("tensor_parallel_num_weight_shards", "gtp_weight_remat_size"),
                *("expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size"),
            ),
            "parallel.tensor: weights are cut over tensor-parallel ranks alone",
        ),
        "params_dtype": "model.dtype",
        "pipeline_dtype": "model.dtype",
        "bf16": "model.dtype",
        "fp16": "model.dtype",
        "transformer_impl": "model.transformer_impl",
    },
    "megatron.optimizer": {
        "lr": "train.optimizer.lr",
        "min_lr": "train.optimizer.lr_floor",
        "weight_decay": "train.optimizer.weight_decay",
        "adam_beta1": "train.optimizer.betas",
        "adam_beta2": "train.optimizer.betas",
        "adam_eps": "train.optimizer.eps",
        "clip_grad": "train.optimizer.clip_grad",
        "bf16": "model.dtype",
        "fp16": "model.dtype",
        "params_dtype": "model.dtype",
        # Megatron has them twice, and goes wrong without a word where they differ.
        "use_distributed_optimizer": "megatron.ddp.use_distributed_optimizer",
        "overlap_param_gather": "megatron.ddp.overlap_param_gather",
    },
}
"""Section -> name -> the key that says it."""
_NEVER_SET: dict[str, dict[str, str]] = {
    "rollout.engine_args": {
        "logprobs_mode": "the trainer needs processed_logprobs",
        "tokenizer_mode": "an engine gets token ids, and has no tokenizer",
        "tokenizer_revision": "an engine gets token ids, and has no tokenizer",
        "code_revision": "a model's own code is never run",
        "runner": "an engine generates",
        "convert": "an engine generates",
        "enable_lora": "all weights are trained and sent",
        "nnodes": "an engine stays on one node",
        "trust_remote_code": "a model's own code is never run",
        "load_format": "an engine loads the files that the trainer reads",
    },
    "megatron.transformer": {
        "moe_expert_capacity_factor": "the engine drops no token",
        **dict.fromkeys(
            (
                *("num_layers", "hidden_size", "num_attention_heads", "num_moe_experts"),
                *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_pre_softmax"),
                *("moe_router_score_function", "moe_router_topk"),
                *("moe_shared_expert_intermediate_size", "moe_router_enable_expert_bias"),
                *("moe_router_group_topk", "moe_router_num_groups"),
                *("moe_router_topk_scaling_factor", "multi_latent_attention", "q_lora_rank"),
                *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
                *("rotary_base", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
                *("rotary_percent", "rotary_interleaved", "original_max_position_embeddings"),
                *("beta_fast", "beta_slow", "ffn_hidden_size", "num_query_groups", "kv_channels"),
                *("qk_layernorm", "add_qkv_bias", "layernorm_epsilon", "window_size"),
                *("window_attn_skip_freq", "activation_func"),
            ),
            "the model's config.json says it",
        ),
        "moe_router_bias_update_rate": "the bias is a buffer that no optimizer holds, which SFPO "
        "could not reposition; it stays as the model has it",
        **dict.fromkeys(
            (
                *("moe_use_legacy_grouped_gemm", "moe_single_grouped_weight"),
                *("mla_down_proj_fusion", "use_grouped_gemm_for_shared_expert"),
            ),
            "its stacked or fused weights are in no table of names",
        ),
    },
    "megatron.optimizer": dict.fromkeys(
        ("decoupled_lr", "decoupled_min_lr"),
        "a checkpoint's groups cannot be told apart: a resume mixes rates",
    ),
}
"""Section -> name -> why it stays as it is, and no key says it."""


def passed_through(config: RunConfig) -> Iterator[Problem]:
    """Names and types of what is handed through."""
    given: dict[str, dict[str, Any]] = {
        "rollout.engine_args": config.rollout.engine_args,
        "megatron.transformer": config.megatron.transformer,
        "megatron.ddp": config.megatron.ddp,
        "megatron.optimizer": config.megatron.optimizer,
    }
    for section, settings in given.items():
        owned, never = (table.get(section, {}) for table in (_OWNED_BY_US, _NEVER_SET))
        fixes = {name: f"remove it and set {owner}" for name, owner in owned.items()}
        fixes |= {name: f"remove it: {why}" for name, why in never.items()}
        for name, value in settings.items():
            if name in fixes:
                yield Problem(f"{section}.{name}", repr(value), "no such key here", fixes[name])
        if settings:
            yield from _unlike_the_fields(section, settings)


def _unlike_the_fields(section: str, settings: dict[str, Any]) -> Iterator[Problem]:
    module, cls = CLASSES[section]
    fields = fields_of(module, cls)
    if fields is None:
        return  # not installed here, or made in a way that its source does not show
    package = module.partition(".")[0]
    for name, value in settings.items():
        key = f"{section}.{name}"
        if name not in fields:
            yield Problem(
                key,
                f"a name that {cls} of the installed {package} does not have",
                "one of its fields",
                did_you_mean(key, fields, value, otherwise="check the spelling"),
            )
        elif package == "vllm" and value is None:
            continue  # its annotations leave out the null of many defaults
        elif not accepts(fields[name], value):
            yield Problem(
                key,
                "null" if value is None else f"{value!r} ({type(value).__name__})",
                f"{fields[name]}, the type of the field of {cls}",
                "correct the value",
            )


def engine_arguments(config: RunConfig) -> Iterator[Problem]:
    """Settings of engines that contradict the rest of the config."""
    rollout = config.rollout
    given = rollout.engine_args
    longest = config.engine_tokens
    length = _int(given, "max_model_len")
    if length is not None and length != -1 and length < longest:  # -1: as long as fits
        yield Problem(
            "rollout.engine_args.max_model_len",
            str(length),
            f"at least {longest} (rollout.max_prompt_tokens + max_response_tokens)",
            "remove it: it is set to that sum",
        )
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_gpu_blocks_override"):
        number = _int(given, name)
        if number is not None and number < 1:
            yield Problem(
                f"rollout.engine_args.{name}", str(number), "1 or more", "raise or remove it"
            )
    tokens, sequences = _int(given, "max_num_batched_tokens"), _int(given, "max_num_seqs")
    if tokens is not None and sequences is not None and tokens < sequences:
        yield Problem(
            "rollout.engine_args.max_num_batched_tokens",
            str(tokens),
            f"at least max_num_seqs ({sequences})",
            "raise it or lower max_num_seqs",
        )
    whole_prompts = given.get("enable_chunked_prefill") is False
    if tokens is not None and tokens < longest and whole_prompts:
        yield _too_few_tokens(tokens, longest)
    if rollout.reproducible and given.get("enable_prefix_caching"):
        yield Problem(
            "rollout.engine_args.enable_prefix_caching",
            "True with rollout.reproducible",
            "false: what the cache holds depends on the order of calls",
            "remove one of the two",
        )
    if given.get("hf_overrides"):
        yield Problem(
            "rollout.engine_args.hf_overrides",
            shown(given["hf_overrides"]),
            "the model's config.json as it is",
            "change config.json instead: the trainer does not see it, so its log-probs and the "
            "engine's may part",
            "warning",
        )


def engine_arguments_on(config: RunConfig, model: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """A rule like `MODEL_RULES`: on a CPU engines take a prompt at once."""
    given = config.rollout.engine_args
    longest = config.engine_tokens
    tokens = _int(given, "max_num_batched_tokens")
    at_once = on_cpu and "enable_chunked_prefill" not in given
    if at_once and tokens is not None and tokens < longest:
        yield replace(_too_few_tokens(tokens, longest), level="error_when_training")


def _too_few_tokens(tokens: int, longest: int) -> Problem:
    return Problem(
        "rollout.engine_args.max_num_batched_tokens",
        f"{tokens} with prompts that are taken at once",
        f"at least {longest} (rollout.max_prompt_tokens + max_response_tokens)",
        "raise or remove it",
    )


def _int(given: dict[str, Any], name: str) -> int | None:
    value = given.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def shown(value: Json) -> str:
    """`value` for a message, in one short line."""
    return shortened(repr(value), 60)
