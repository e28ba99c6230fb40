"""Cross-checks: one row a refusal, each with its key, what was found, expected, and the fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_check
from made.models import LATENT, LLAMA3_ROPE, MOE

from sfpo_megatron import cli
from sfpo_megatron.config.load import ConfigError


@dataclass(frozen=True)
class Case:
    """Overrides of the run and changes to the model that must be refused at `key`."""

    key: str
    found: str
    expected: str
    fix: str
    overrides: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None


def case(key: str, found: str, expected: str, fix: str, *overrides: str, **rest: Any) -> Case:
    world_size = rest.pop("world_size", None)
    return Case(key, found, expected, fix, overrides, rest, world_size)


ROWS = "data.train=[{source: jsonl, path: model/config.json}]"
CASES = {
    # whose log-probs the ratio is to
    **{name: case(
        "objective.old_logprobs", f"generator with {found}", expected, fix,
        "objective.old_logprobs=generator", *overrides)
        for name, (found, expected, fix, *overrides) in {
            "generator_of_a_nucleus": (
                "rollout.top_p 0.9", "top_p 1", "renormalized", "rollout.top_p=0.9"),
            "generator_of_stale_weights": (
                "rollout.async_steps 1", "by the weights that are updated", "async_steps: 0",
                "rollout.async_steps=1", "objective.importance_sampling.weight=token"),
            "generator_that_rounds": (
                "model.dtype bfloat16", "float32, where engine and trainer agree",
                "set objective.importance_sampling.weight: token", "model.dtype=bfloat16"),
            "generator_quantized": (
                "rollout.quantization fp8_per_channel", "float32",
                "set objective.importance_sampling.weight: token", "model.dtype=bfloat16",
                "rollout.quantization=fp8_per_channel"),
            "generator_and_rejection": (
                "objective.importance_sampling.reject token", "reject: none", "trainer's",
                "objective.importance_sampling.reject=token"),
            "generator_and_whole_responses": (
                "objective.importance_sampling.weight sequence and reject sequence",
                "weight: token", "trainer's", "objective.importance_sampling.weight=sequence",
                "objective.importance_sampling.reject=sequence"),
            "generator_and_a_penalised_reward": (
                "objective.kl.where: reward", "a penalty in the loss", "set kl.where: loss",
                "objective.kl.coef=0.1", "objective.kl.where=reward"),
            "generator_of_saved_rollouts": (
                "debug.train_only", "by the weights that are updated", "saved rollouts",
                "debug.train_only=model/config.json"),
        }.items()},
    # algorithm
    "gate_warmup_of_all": case(
        "sfpo.entropy_warmup_steps", "40", "fewer than the run's train steps (40)", "shorten",
        "train.num_steps=40", "sfpo.entropy_warmup_steps=40"),
    # layout
    "heads_by_tp": case(
        "parallel.tensor", "4", "num_attention_heads (6)", "one of 1, 2", "parallel.tensor=4"),
    "kv_heads_by_tp": case(
        "parallel.tensor", "3", "multiple of the model's num_key_value_heads (2)",
        "one of 1, 2", "parallel.tensor=3"),
    "qkv_rows_by_tp": case(
        "parallel.tensor", "3", "rows of queries, keys and values (256)", "one of 1",
        "parallel.tensor=3", num_key_value_heads=1),
    "hidden_by_tp": case(
        "parallel.tensor", "2", "hidden_size (193)", "one of", "parallel.tensor=2",
        hidden_size=193, head_dim=32),
    "ffn_by_tp": case(
        "parallel.tensor", "2", "intermediate_size (385)", "one of", "parallel.tensor=2",
        intermediate_size=385),
    "layers_by_pp": case(
        "parallel.pipeline", "3 stages", "num_hidden_layers (4)", "1, 2, 4",
        "parallel.pipeline=3"),
    "layers_by_vpp": case(
        "parallel.pipeline", "2 stages x 4 chunks", "num_hidden_layers (4)", "1, 2, 4",
        "parallel.pipeline=2", "parallel.virtual_pipeline=4"),
    "vpp_without_pp": case(
        "parallel.virtual_pipeline", "2", "null when parallel.pipeline is 1", "set it to null",
        "parallel.virtual_pipeline=2"),
    "expert_of_dense": case(
        "parallel.expert", "2 with a qwen2 model", "1", "no experts", "parallel.expert=2",
        "parallel.data=2"),
    "expert_tensor_of_dense": case(
        "parallel.expert_tensor", "2 with a qwen2 model", "1", "no experts",
        "parallel.expert_tensor=2", "parallel.data=2"),
    "expert_beyond_the_ranks": case(
        "parallel.expert", "2 (x expert_tensor 1)", "data x tensor x context (1)",
        "raise parallel.data", "parallel.expert=2", **MOE),
    "expert_beyond_the_ranks_data_null": case(
        "parallel.expert", "4 (x expert_tensor 1)", "data x tensor x context (2)",
        "raise parallel.data", "parallel.expert=4", "parallel.data=null", "parallel.pipeline=2",
        world_size=4, **MOE),
    "experts_by_ep": case(
        "parallel.expert", "3", "the model's experts (8)", "another size", "parallel.expert=3",
        "parallel.data=3", "train.group_size=3", **MOE),
    "expert_size_by_etp": case(
        "parallel.expert_tensor", "3", "the model's expert size (128)", "another size",
        "parallel.expert_tensor=3", "parallel.data=3", "train.group_size=3", **MOE),
    "expert_size_by_engine_tp": case(
        "rollout.tensor_parallel", "3", "the model's expert size (128)", "one of 1, 2",
        "rollout.tensor_parallel=3", **MOE),
    "heads_by_engine_tp": case(
        "rollout.tensor_parallel", "4", "num_attention_heads (6)", "one of 1, 2",
        "rollout.tensor_parallel=4"),
    "kv_heads_by_engine_tp": case(
        "rollout.tensor_parallel", "3", "multiple of the model's num_key_value_heads (2)",
        "one of 1, 2", "rollout.tensor_parallel=3", vocab_size=192),
    "ffn_by_engine_tp": case(
        "rollout.tensor_parallel", "2", "intermediate_size (385)", "one of 1",
        "rollout.tensor_parallel=2", intermediate_size=385),
    "shared_experts_by_engine_tp": case(
        "rollout.tensor_parallel", "2", "expert size (65)", "one of 1",
        "rollout.tensor_parallel=2", **LATENT | {"moe_intermediate_size": 65}),
    "vocabulary_by_engine_tp": case(
        "rollout.tensor_parallel", "3", "vocab_size, which vLLM pads to 64s (128)",
        "one of 1, 2", "rollout.tensor_parallel=3", num_key_value_heads=6),
    "experts_by_engine_tp": case(
        "rollout.tensor_parallel", "4", "number of experts (2)", "one of 1, 2",
        "rollout.tensor_parallel=4",
        **MOE | {"num_experts": 2, "num_attention_heads": 8, "head_dim": 32}),
    "experts_need_sequence_parallel": case(
        "parallel.sequence", "false with experts and tensor 2", "true", "sequence parallelism only",
        "parallel.tensor=2", "parallel.expert=2", **MOE),
    "experts_copied_over_tp": case(
        "parallel.expert_tensor", "1 with expert 1 and tensor 2", "2, or parallel.expert above 1",
        "set parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true", **MOE),
    "experts_with_scales_of_their_own": case(
        "model.dtype", "float16 with parallel.expert 2", "loss scale of the experts' optimizer",
        "a constant megatron.optimizer.loss_scale", "model.dtype=float16", "parallel.expert=2",
        "parallel.data=2", **MOE),
    "auxiliary_loss_by_cp": case(
        "megatron.transformer.moe_aux_loss_coeff", "0.001 with parallel.context 2",
        "no auxiliary loss", "set it to 0", "parallel.context=2",
        "megatron.transformer={moe_aux_loss_coeff: 1e-3, moe_router_load_balancing_type: aux_loss}",
        **MOE),
    "auxiliary_loss_of_the_model_by_cp": case(
        "megatron.transformer.moe_router_load_balancing_type",
        "seq_aux_loss with parallel.context 2", "no auxiliary loss", "router_aux_loss_coef holds",
        "parallel.context=2", "megatron.transformer.moe_router_load_balancing_type=seq_aux_loss",
        **MOE, router_aux_loss_coef=0.001),
    "sinkhorn": case(
        "megatron.transformer.moe_router_load_balancing_type", "sinkhorn", "aux_loss",
        "route tokens otherwise",
        "megatron.transformer.moe_router_load_balancing_type=sinkhorn", **MOE),
    "dense_layers_among_experts": case(
        "model.path", "mlp_only_layers [0]", "experts in every layer", "choose",
        **MOE, mlp_only_layers=[0]),
    "sparse_step": case(
        "model.path", "decoder_sparse_step 2", "experts in every layer", "choose",
        **MOE, decoder_sparse_step=2),
    "shared_experts": case(
        "model.path", "shared experts", "routed experts only", "choose",
        **MOE, shared_expert_intermediate_size=64),
    "no_expert_size": case(
        "model.path", "moe_intermediate_size = 0", "a positive integer", "restore",
        **{**MOE, "moe_intermediate_size": 0}),
    "too_many_chosen": case(
        "model.path", "num_experts_per_tok 9", "at most 8 experts", "choose",
        **{**MOE, "num_experts_per_tok": 9}),
    "router_without_gradient": case(
        "model.path", "num_experts_per_tok 1, normalized", "2 or more", "choose",
        **{**MOE, "num_experts_per_tok": 1}),
    "world_size": case(
        "parallel", "4 ranks", "2 (data 1 x tensor 2", "start that many ranks",
        "parallel.tensor=2", world_size=4),
    "world_size_data_null": case(
        "parallel", "3 ranks", "a multiple of 2", "another number of ranks",
        "parallel.tensor=2", "parallel.data=null", world_size=3),
    # batch
    "microbatch_below_one_rollout": case(
        "train.max_tokens_per_microbatch", "64", "(96 tokens", "set it to 96",
        "train.max_tokens_per_microbatch=64"),
    "microbatch_below_one_rollout_cp": case(
        "train.max_tokens_per_microbatch", "47", "over 2 context-parallel ranks", "set it to 48",
        "train.max_tokens_per_microbatch=47", "parallel.context=2"),
    "context_local": case(
        "parallel.context", "2 with model.transformer_impl local", "1 (the torch attention",
        "set it to 1", "parallel.context=2", "model.transformer_impl=local"),
    "context_sequence_ratio": case(
        "objective.ratio", "sequence with parallel.context 2", "averaged over a whole response",
        "set it to token", "parallel.context=2", "objective.ratio=sequence"),
    "context_sequence_mean": case(
        "objective.aggregation", "seq_mean_token_mean with parallel.context 2",
        "averaged over a whole response", "set it to token_mean",
        "parallel.context=2", "objective.aggregation=seq_mean_token_mean"),
    "context_sequence_weight": case(
        "objective.importance_sampling.weight", "sequence with parallel.context 2",
        "averaged over a whole response", "set it to token",
        "parallel.context=2", "objective.importance_sampling.weight=sequence"),
    "context_auxiliary_loss": case(
        "megatron.transformer.moe_z_loss_coeff", "0.1 with parallel.context 2",
        "no auxiliary loss", "set it to 0",
        "parallel.context=2", "megatron.transformer.moe_z_loss_coeff=0.1"),
    "beyond_positions": case(
        "rollout.max_response_tokens", "564 tokens", "max_position_embeddings (512)", "lower",
        "rollout.max_response_tokens=500"),
    # the model directory
    "path_not_there": case(
        "model.path", "no directory './none'", "a Hugging Face model directory", "correct",
        "model.path=./none"),
    "path_partly_there": case(
        "model.path", "no directory 'model/none'", "model directory", "correct",
        "model.path=model/none"),
    "a_file": case(
        "model.path", "a file, not a directory", "model directory", "folder that holds config",
        "model.path=model/config.json"),
    "architecture": case(
        "model.path", "architecture GemmaForCausalLM", "Qwen2ForCausalLM", "choose",
        architectures=["GemmaForCausalLM"]),
    "no_architecture": case("model.path", "architecture None", "Qwen2", "choose",
        architectures=None),
    "missing_size": case(
        "model.path", "num_hidden_layers = None", "a positive integer", "restore",
        num_hidden_layers=None),
    "narrow_heads_on_cpu": case(
        "model.path", "head_dim 16", "head_dim >= 32 (vLLM on CPU)", "fewer, wider heads",
        head_dim=16),
    "heads_do_not_divide": case(
        "model.path", "hidden_size 193 with 6 heads", "a whole head_dim", "restore",
        hidden_size=193),
    "quantized": case(
        "model.path", "quantization_config", "unquantized weights", "before quantization",
        quantization_config={"quant_method": "fp8"}),
    "rope": case(
        "model.path", "rope type longrope", "default, linear, llama3 or yarn", "use a model",
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
    "rope_transformers_4": case(
        "model.path", "rope type dynamic", "default, linear, llama3 or yarn", "use a model",
        rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2}),
    "rope_of_half_a_llama": case(
        "model.path", "rope type llama3 without high_freq_factor", "a number", "restore",
        rope_parameters={**LLAMA3_ROPE, "high_freq_factor": None}),
    "rope_without_factor": case(
        "model.path", "rope type llama3 without a factor", "one", "restore",
        rope_parameters={**LLAMA3_ROPE, "factor": None}),
    "partial_rotary": case(
        "model.path", "partial_rotary_factor 0.5", "the whole head", "choose",
        partial_rotary_factor=0.5),
    "layer_types": case(
        "model.path", "1 layer_types", "one for each of 4 layers", "restore",
        layer_types=["full_attention"]),
    "llama_window": case(
        "model.path", "sliding-window attention in a Llama", "full attention", "choose",
        architectures=["LlamaForCausalLM"], layer_types=["sliding_attention"] * 4),
    "activation": case("model.path", "hidden_act gelu", "silu", "SwiGLU", hidden_act="gelu"),
    "mlp_bias": case("model.path", "mlp_bias", "no MLP bias", "choose", mlp_bias=True),
    "attention_bias": case(
        "model.path", "attention_bias", "beyond the family's own", "choose", attention_bias=True),
    "overlong_buffer": case(
        "objective.overlong.buffer_tokens", "40", "at most rollout.max_response_tokens (32)",
        "shorten the buffer", "objective.overlong.buffer_tokens=40"),
    # files and sections against one another
    "jsonl_with_gym_reward": case(
        "reward.function", "data.train.0.source jsonl", "only needs the answer", "exact_match",
        ROWS),
    "output_is_a_file": case(
        "output_dir", "/model/config.json'", "a folder", "choose another",
        "output_dir=model/config.json/x"),
    "output_is_the_model": case(
        "output_dir", "which is model.path", "a folder of its own", "write over the model",
        "output_dir=./model"),
    "train_only_not_there": case(
        "debug.train_only", "no file 'x.safetensors'", "debug.save_rollouts", "correct the path",
        "debug.train_only=x.safetensors"),
    "owned_engine_arg": case(
        "rollout.engine_args.dtype", "'bfloat16'", "no such key here", "set model.dtype",
        "rollout.engine_args.dtype=bfloat16"),
    "remote_code": case(
        "rollout.engine_args.trust_remote_code", "True", "no such key", "remove it: a model's own",
        "rollout.engine_args.trust_remote_code=true"),
    "other_quantization": case(
        "rollout.engine_args.quantization", "'int8_w8a8'", "no such key", "silently wrong",
        "rollout.engine_args.quantization=int8_w8a8"),
    "quantized_float32": case(
        "rollout.quantization", "model.dtype: float32", "bfloat16", "set model.dtype",
        "rollout.quantization=fp8_per_channel"),
    "owned_sleep_mode": case(
        "rollout.engine_args.enable_sleep_mode", "True", "no such key", "rollout.placement",
        "rollout.engine_args.enable_sleep_mode=true"),
    "owned_transformer_arg": case(
        "megatron.transformer.num_layers", "2", "no such key",
        "remove it: the model's config.json says it",
        "megatron.transformer.num_layers=2"),
    "experts_of_the_model": case(
        "megatron.transformer.moe_router_topk", "4", "no such key", "the model's config.json",
        "megatron.transformer.moe_router_topk=4"),
    "expert_bias": case(
        "megatron.transformer.moe_router_enable_expert_bias", "True", "no such key",
        "the model's config.json",
        "megatron.transformer.moe_router_enable_expert_bias=true"),
    "expert_bias_update": case(
        "megatron.transformer.moe_router_bias_update_rate", "0.001", "no such key",
        "remove it: the bias is a buffer that no optimizer holds",
        "megatron.transformer.moe_router_bias_update_rate=0.001"),
    "latents_on_cpu": case(
        "model.path", "kv_lora_rank 256 and qk_rope_head_dim 64", "512 and 64 (vLLM on CPU)",
        "run on a GPU", **LATENT | {"kv_lora_rank": 256}),
    "dense_layers_by_tp": case(
        "parallel.tensor", "2", "intermediate_size (385)", "one of", "parallel.tensor=2",
        "parallel.sequence=true", "parallel.expert=2", "parallel.data=1",
        **LATENT | {"intermediate_size": 385}),
    "shared_experts_by_tp": case(
        "parallel.tensor", "2", "shared expert size (65)", "one of", "parallel.tensor=2",
        "parallel.sequence=true", "parallel.expert=2", "parallel.data=1",
        **LATENT | {"moe_intermediate_size": 65}),
    "owned_optimizer_arg": case(
        "megatron.optimizer.lr", "0.1", "no such key", "set train.optimizer.lr",
        "megatron.optimizer.lr=0.1"),
    "offloaded_fp32": case(
        "megatron.optimizer.optimizer_cpu_offload", "true with model.dtype: float32",
        "bfloat16 params", "model.dtype: bfloat16",
        "megatron.optimizer.optimizer_cpu_offload=true"),
    "offloaded_sgd": case(
        "megatron.optimizer.optimizer_cpu_offload", "true with megatron.optimizer.optimizer: sgd",
        "false", "use adam", "megatron.optimizer.optimizer=sgd", "model.dtype=bfloat16",
        "megatron.optimizer.optimizer_cpu_offload=true",
        "megatron.ddp.use_distributed_optimizer=false"),
    "scaled_moments": case(
        "megatron.optimizer.exp_avg_dtype", "float16 with sfpo.moments: restore", "float32",
        "sfpo.moments: keep", "megatron.optimizer.exp_avg_dtype=float16", "sfpo.moments=restore",
        "megatron.optimizer.use_precision_aware_optimizer=true"),
    "resume_from_nowhere": case(
        "checkpoint.resume", "no directory 'runs/none'", "auto, never, or the directory",
        "correct the path", "checkpoint.resume=runs/none"),
    "limit_without_checkpoints": case(
        "checkpoint.every", "0 with a time limit", "1 or more", "set checkpoint.every",
        "checkpoint.every=0", "checkpoint.must_save_within_s=60"),
}  # fmt: skip


def test_the_base_of_all_cases_is_fine(here: Path) -> None:
    """Else every case below would pass for the wrong reason."""
    assert run_check(for_training=True) == []


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_refused(here: Path, model_dir: Callable[..., Path], name: str) -> None:
    expected = CASES[name]
    for file in (here / "model").iterdir():
        file.unlink()
    model_dir(**expected.model)
    with pytest.raises(ConfigError) as caught:
        run_check(*expected.overrides, world_size=expected.world_size)
    error = caught.value
    assert (error.file, error.key) == ("run.yaml", expected.key)
    assert expected.found in error.found
    assert expected.expected in error.expected
    assert expected.fix in error.fix
    assert str(error) == (
        f"run.yaml: {error.key}: found {error.found}, expected {error.expected}; {error.fix}"
    )


CLI_CASES = (
    *("heads_by_tp", "layers_by_pp", "microbatch_below_one_rollout"),
    *("path_not_there", "narrow_heads_on_cpu"),
)


@pytest.mark.parametrize("command", ["check", "train", "sft"])
@pytest.mark.parametrize("name", CLI_CASES)
def test_refused_by_the_command_line(
    here: Path,
    model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: str,
) -> None:
    """One line on stderr, exit code 2, nothing started, nothing written."""
    expected = CASES[name]
    model_dir(**expected.model)
    assert cli.main([command, "run.yaml", *expected.overrides]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith(f"error: run.yaml: {expected.key}: found ")
    assert expected.expected in last
    assert out == ""
    assert not (here / "run").exists()
