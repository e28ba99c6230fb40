"""Suggestions for a name that is no key: ours elsewhere in the tree, a peer's, or a misspelling."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from sfpo_megatron.config.origin import join
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.types import Json


def _table(text: str) -> dict[str, str]:
    """Name in a peer's config -> our key."""
    rows = (row.split(": ") for row in re.sub(r"\n +", " ", text).strip().splitlines())
    return {name: key for key, names in rows for name in names.split()}


_PEERS = """
seed: random_seed global_seed train.seed grpo.seed
output_dir: output_path save_path save_dir ckpt_path ckpt_dir default_local_dir checkpoint_dir
    log_dir logging_dir run_dir save ckpt.output_dir
model.path: model_name_or_path model_name model_path pretrain hf_checkpoint tokenizer_name
    tokenizer_path policy_model_name
model.dtype: bf16 fp16 precision torch_dtype param_dtype
parallel.data: data_parallel_size dp_size dp num_gpus n_gpus_per_node gpus_per_node
    num_gpus_per_node actor_num_gpus_per_node
parallel.tensor: tensor_model_parallel_size tensor_parallel_size tp_size tp
parallel.pipeline: pipeline_model_parallel_size pipeline_parallel_size pp_size pp
parallel.virtual_pipeline: virtual_pipeline_model_parallel_size vpp vpp_size
parallel.context: context_parallel_size cp_size cp ulysses_sequence_parallel_size
parallel.expert: expert_model_parallel_size expert_parallel_size ep_size ep
parallel.expert_tensor: expert_tensor_parallel_size etp
parallel.sequence: sequence_parallel
megatron.transformer.recompute_granularity: gradient_checkpointing recompute
    enable_gradient_checkpointing activation_checkpointing recompute_granularity
megatron.transformer: override_transformer_config
megatron.ddp: distributed_data_parallel_config override_ddp_config
megatron.optimizer: override_optimizer_config
megatron.ddp.use_distributed_optimizer: use_distributed_optimizer
megatron.ddp.overlap_grad_reduce: overlap_grad_reduce
megatron.ddp.overlap_param_gather: overlap_param_gather
megatron.ddp.grad_reduce_in_fp32: grad_reduce_in_fp32 accumulate_allreduce_grads_in_fp32
megatron.optimizer.optimizer_cpu_offload: optimizer_cpu_offload param_offload optimizer_offload
megatron.transformer.recompute_method: recompute_method
megatron.transformer.recompute_num_layers: recompute_num_layers
megatron.transformer.moe_grouped_gemm: moe_grouped_gemm
train.num_steps: max_steps num_train_steps total_training_steps max_num_steps train_iters
    train_steps num_rollout total_steps
train.num_epochs: epochs num_epochs total_epochs num_train_epochs max_epochs num_episodes
    num_epoch max_num_epochs
train.prompts_per_step: train_batch_size rollout_batch_size batch_size num_prompts_per_step
    gen_batch_size prompts_per_batch generation_batch_size
train.group_size: n num_generations n_samples_per_prompt num_generations_per_prompt rollout_n
    num_return_sequences samples_per_prompt num_samples_per_prompt n_samples rollouts_per_prompt
    num_rollouts_per_prompt group
train.minibatches_per_step: ppo_mini_batch_size mini_batch_size num_mini_batches num_minibatches
    num_steps_per_rollout minibatch_size global_batch_size train_global_batch_size
    steps_per_generation
train.microbatch_size: micro_batch_size per_device_train_batch_size ppo_micro_batch_size
    ppo_micro_batch_size_per_gpu micro_train_batch_size train_micro_batch_size
    gradient_accumulation_steps log_prob_micro_batch_size_per_gpu
train.max_tokens_per_microbatch: ppo_max_token_len_per_gpu max_tokens_per_gpu
    max_token_len_per_gpu train_mb_tokens sequence_packing use_dynamic_bsz
train.optimizer.lr: lr learning_rate actor_lr actor_learning_rate base_lr lr_rate
train.optimizer.lr_warmup_steps: warmup_steps num_warmup_steps lr_warmup_iters warmup lr_warmup
    warmup_ratio lr_warmup_ratio lr_warmup_steps_ratio
train.optimizer.lr_schedule: lr_scheduler lr_scheduler_type lr_decay_style scheduler lr_style
    warmup_style
train.optimizer.lr_floor: min_lr lr_min min_lr_ratio
train.optimizer.lr_decay_steps: lr_wsd_decay_iters wsd_decay_steps num_decay_steps
train.optimizer.betas: adam_betas adam_beta1 adam_beta2 beta1 beta2
train.optimizer.eps: adam_eps adam_epsilon
train.optimizer.weight_decay: wd l2
train.optimizer.clip_grad: max_grad_norm grad_clip gradient_clipping max_norm gradient_clip_val
    grad_norm_clip
train.control_timeout_s: nccl_timeout distributed_timeout_minutes
train.logprob_chunk_tokens: logprob_chunk_size log_probs_chunk_size
sfpo.num_fast_passes: ppo_epochs num_iterations sfpo_inner_steps inner_steps K num_ppo_epochs
    lookahead_steps
sfpo.alpha: sfpo_step_size lookahead_alpha slow_step_size gxpo_alpha
objective.old_logprobs: use_rollout_log_probs use_rollout_logprobs bypass_mode
objective.advantage: adv_estimator advantage_estimator algorithm algo adv adv_estimator.name
    use_leave_one_out_baseline
objective.loss: policy_loss loss_fn loss_mode use_cispo
objective.normalize_std: norm_adv_by_std_in_grpo scale_rewards normalize_rewards
    disable_grpo_std_normalization no_std_norm
objective.clip_low: clip_ratio cliprange clip_range epsilon eps_clip clip_ratio_low epsilon_low
    ratio_clip_min
objective.clip_high: clip_ratio_high epsilon_high eps_clip_high ratio_clip_max eps_clip_low_high
objective.dual_clip: clip_ratio_c ratio_clip_c delta eps_clip_c
objective.aggregation: loss_agg_mode loss_type token_level_loss calculate_per_token_loss
objective.entropy_coef: entropy_coeff entropy_loss_coef ent_coef entropy_bonus
objective.kl.coef: kl_coef beta init_kl_coef kl_loss_coef kl_coeff kl_penalty_coef kl_beta
    reference_policy_kl_penalty use_kl_loss kl_ctrl use_kl_in_reward kl.init_coef
objective.kl.estimator: kl_loss_type kl_estimator kl_penalty kl.estimator reference_policy_kl_type
objective.importance_sampling.weight: use_tis tis rollout_is vllm_importance_sampling_correction
    is_correction_type is_correction_enable truncated_importance_sampling_type
    vllm_importance_sampling_mode
objective.importance_sampling.max_weight: tis_imp_ratio_cap tis_clip tis_threshold
    rollout_is_threshold truncated_importance_sampling_ratio vllm_importance_sampling_clip_max
objective.ratio: policy_loss_type importance_sampling_level sequence_level_importance_ratios
objective.overlong.mask_truncated: mask_truncated_completions overlong_filtering
objective.overlong.buffer_tokens: overlong_buffer_len overlong_buffer_length
objective.kl.where: kl.use_loss
rollout.num_engines: num_vllm_engines vllm_num_engines rollout_num_gpus num_workers_vllm
    num_engines
rollout.tensor_parallel: rollout_num_gpus_per_engine vllm_tensor_parallel_size
    rollout_tensor_parallel_size
rollout.placement: colocate colocate_all_models hybrid_engine vllm_mode colocated colocate_all
    colocated.enabled
rollout.max_response_tokens: max_new_tokens max_response_length response_length
    max_completion_length generate_max_len max_gen_len max_tokens rollout_max_response_len
    max_gen_length
rollout.max_prompt_tokens: max_prompt_length prompt_length prompt_max_len max_input_length
    max_input_seq_length rollout_max_prompt_len
rollout.gpu_memory_utilization: vllm_gpu_memory_utilization mem_fraction_static gpu_util
    gpu_memory_utilization
rollout.drop_groups: dynamic_sampling filter_groups use_dynamic_sampling
    dynamic_sampling_filter_path dynamic_filtering_enable filter_groups.enable
rollout.async_steps: async_mode staleness_threshold max_staleness off_policy_steps async_enable
    async_grpo.enabled
rollout.engine_args: vllm_kwargs vllm_config vllm_args engine_kwargs vllm
rollout.engine_args.enforce_eager: enforce_eager
rollout.engine_args.max_num_seqs: max_num_seqs
rollout.engine_args.max_num_batched_tokens: max_num_batched_tokens
rollout.environment: custom_generate_function_path agent_func_path
rollout.temperature: rollout_temperature
rollout.top_p: rollout_top_p
rollout.oversample: over_sampling_batch_size batch_multiplier
rollout.max_rounds: dynamic_sampling_max_gen_batches max_num_gen_batches
refit.transport: weight_sync_backend vllm_sync_backend update_weights_backend sync_backend
refit.bucket_bytes: update_weight_buffer_size
refit.verify_every: check_weight_update_equal
data.train: train_files train_file train_data dataset dataset_name prompt_data datasets
    train_dataset dataset_path prompt_dataset input_key prompt_key label_key answer_key
data.eval: val_files val_file val_data eval_files eval_file eval_dataset eval_prompt_data
    test_files validation_files eval.dataset eval.data eval.files eval.path
data.on_bad_row: filter_overlong_prompts truncation
data.chat_template: apply_chat_template use_chat_template
data.chat_template_args: chat_template_kwargs apply_chat_template_kwargs
reward.function: reward_fn reward_funcs reward_func reward_model custom_reward_function rm_type
    reward_manager reward_weights verifier custom_rm_path
reward.http.url: remote_rm_url rm_url remote_url
eval.every: eval_interval eval_steps test_freq eval_freq val_period eval_every eval_period
    val_interval eval.steps
eval.n: n_samples_per_eval_prompt eval_n val_n eval_num_samples val_kwargs.n
    eval.n_samples_per_prompt val_num_generations_per_prompt num_generations_eval
eval.temperature: val_kwargs.temperature eval_temperature val_temperature
eval.top_p: val_kwargs.top_p eval_top_p val_top_p
eval.max_response_tokens: eval_max_response_len val_kwargs.max_tokens
eval.stop_at: stop_at_validation_threshold
checkpoint.every: save_interval save_steps save_freq save_every save_period checkpoint_interval
checkpoint.keep_last: save_total_limit max_ckpt_to_keep max_actor_ckpt_to_keep max_ckpt_num
    keep_top_k keep_last_n max_num
checkpoint.resume: resume_from_checkpoint resume_mode resume_from resume_path load load_checkpoint
    load_enable
checkpoint.stop_before_walltime_s: checkpoint_must_save_by
trace.steps: profile_steps profiler_steps profile_step_start
trace.torch_profiler: profile use_pytorch_profiler
tracking.sinks: wandb report_to logger use_wandb wandb_project tensorboard trackers swanlab mlflow
    log_to
tracking.project: project_name
tracking.samples.every: log_val_generations log_completions
tracking.samples.num_prompts: num_val_samples_to_print num_completions_to_print
tracking.run_name: experiment_name wandb_run_name wandb_name
debug.save_rollouts: save_debug_rollout_data
debug.train_only: load_debug_rollout_data
debug.rollout_only: debug_rollout_only
"""
"""Our key, and after it what peers call it; one with a dot, such as `kl.use_loss`, only below a
section of that name."""
_IN_ROLLOUT: Mapping[str, str] = {
    "tensor_parallel_size": "rollout.tensor_parallel",
    "tensor_model_parallel_size": "rollout.tensor_parallel",
    "tp_size": "rollout.tensor_parallel",
    "tp": "rollout.tensor_parallel",
    "data_parallel_size": "rollout.num_engines",
    "dp_size": "rollout.num_engines",
}
"""Names that mean another key in a section about engines."""
_IN_SOURCE: Mapping[str, str] = _table("""
path: dataset_name dataset_path dataset dataset_id data_files data_file file files data_path repo_id
config: name dataset_config dataset_config_name config_name subset subset_name
split: dataset_split hf_split
columns: prompt_column question_column answer_column input_key label_key prompt_key answer_key
    question_key output_key response_key reference_key column_mapping
weight: prob probability ratio dataset_weight sampling_weight
size: max_samples num_samples limit
reward: reward_fn rm_type verifier
""")
"""The same in one of data.train or data.eval."""
_AMBIGUOUS: Mapping[str, tuple[str, ...]] = {
    "train.batch_size": ("train.prompts_per_step", "train.minibatches_per_step"),
    "train.max_epochs": ("train.num_epochs", "sfpo.num_fast_passes"),
}
"""What they would mean here, and what they mean in OpenRLHF."""
_WHY_NOTHING: Mapping[str, str] = {
    "all weights are trained": "lora lora_rank lora_alpha lora_r peft peft_config use_peft "
    "target_modules",
    "the trainer is Megatron-Core": "deepspeed zero_stage fsdp fsdp_config use_fsdp strategy "
    "accelerate deepspeed_plugin",
    "there is no critic, advantages are those of a group": "critic value_model critic_model "
    "critic_pretrain vf_coef value_loss_coef gae_lambda gamma lam critic_warmup",
    "nodes are those of the job: slurm CONFIG --nodes N, or torchrun's": "nnodes num_nodes "
    "actor_num_nodes critic_num_nodes ref_num_nodes reward_num_nodes n_nodes",
    "an evaluation comes before the first step too (eval.every)": "val_before_train eval_on_start "
    "val_at_start skip_eval_before_train eval_at_start",
    "the reference has the weights of model.path": "ref ref_model reference_model ref_model_path "
    "ref_load sync_ref_model",
    "responses are of the whole distribution, as the trainer's log-probs": "top_k min_p "
    "repetition_penalty presence_penalty frequency_penalty",
    "a response ends at an end-of-sequence token": "stop stop_strings stop_words stop_token_ids",
    "the trainer and the engines choose it themselves": "attn_implementation attn_backend "
    "attention_implementation use_flash_attn flash_attn use_flash_attention_2",
    "a model's own code is never run": "trust_remote_code",
    "the model's config.json says it": "num_layers hidden_size num_attention_heads vocab_size "
    "ffn_hidden_size num_query_groups seq_length max_position_embeddings",
    "engines are always vLLM's": "use_vllm use_sglang inference_engine",
    "every train step is logged": "logging_steps log_interval log_freq log_every logging_strategy",
    "ranks get equal work in any case": "balance_batch balance_data",
}
_NOTHING = {name: why for why, names in _WHY_NOTHING.items() for name in names.split()}
"""What has no key here, and why."""
_ROLLOUT_SECTIONS = ("rollout", "vllm", "generation", "engine")
_MAX_SHOWN = 3


PEERS: Mapping[str, str] = _table(_PEERS)
"""Name in a peer's config -> our key."""


def did_you_mean(key: str, siblings: Iterable[str], inside: Json = None, *, otherwise: str) -> str:
    """What to do about the unknown dotted `key`, in whose place `siblings` are known.

    `inside`: its value; a section of a peer's config is told by the keys in it.
    """
    known = {str(name) for name in siblings}
    *above, name = key.split(".")
    if _no_space(name, inside):
        written, _, value = name.partition(":")
        return f"write {written}: {value}, with a space after the colon"
    if (close := _close(name, known, 0.9)) is not None:
        return close
    if why := _NOTHING.get(_plain(name)):
        return f"remove it: {why}"
    leaves = [[*above, name, *path] for path in _leaves(inside)]
    paths = leaves or [key.split(".")]
    ours = [target for path in paths for target in _of_ours(path[-1], path[:-1])]
    peers = [target for path in leaves for target in _of_peers(path[-1], path[:-1])]
    peers = peers or _of_peers(name, above)
    nothing = [why for path in leaves if (why := _NOTHING.get(_plain(path[-1])))]
    if nothing and not peers and not ours:
        return f"remove it: {nothing[0]}"
    # A section that is misspelt, `trian: {num_steps: 3}`, before all keys that end like it.
    nearly = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    misspelt = [s for s in nearly if any(target.startswith(f"{s}.") for target in ours)]
    for found in (peers, misspelt, ours):
        if found:
            shown = list(dict.fromkeys(found))[:_MAX_SHOWN]
            return f"did you mean {' or '.join(shown)}?"
    return _close(name, known, 0.6) or otherwise


def instead_of_word(text: str, options: Iterable[str], *, has_keys: bool) -> str | None:
    """What may be meant by a word of a command line that is neither an option nor KEY=VALUE: one of
    `options` (written as Python's names), or a key; None for no idea."""
    written, _, value = text.lstrip("-+~").replace(":", "=", 1).partition("=")
    name = ".".join(part.replace("-", "_") for part in written.split("."))
    if text.startswith("-"):
        if name in ("config", "config_file", "config_path"):
            return "give the file alone"
        if close := difflib.get_close_matches(name, list(options), n=1, cutoff=0.75):
            return f"did you mean --{close[0].replace('_', '-')}?"
    if not has_keys:
        return None
    above, _, last = name.rpartition(".")
    top = {field.name for field in dataclasses.fields(RunConfig)}
    if name in (_last_parts().get(last, ()) if above else top):
        return f"write {name}={value or 'VALUE'}"
    meant = did_you_mean(name, top, otherwise="")
    return f"{meant} A key is set by KEY=VALUE" if meant else None


def _close(name: str, known: set[str], cutoff: float) -> str | None:
    found = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {found[0]}?" if found else None


def _no_space(name: str, inside: Json) -> bool:
    """Whether `{size:5}` was meant as `{size: 5}`: YAML takes it for a key without a value."""
    return ":" in name and inside is None


def _leaves(value: Json, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, (*path, str(name)))
    elif path:
        yield list(path)


def _of_peers(name: str, above: list[str]) -> list[str]:
    """Our key for what peers call `name`, which stands under the sections `above`."""
    plain = _plain(name)
    if plain in _IN_ROLLOUT and any(part.split("_")[0] in _ROLLOUT_SECTIONS for part in above):
        return [_IN_ROLLOUT[plain]]
    if above[:1] == ["data"] and above[-1].isdecimal() and plain in _IN_SOURCE:
        return [_IN_SOURCE[plain]]
    below = f"{_plain(above[-1])}.{plain}" if above else plain
    if below in _AMBIGUOUS:
        return [*_AMBIGUOUS[below]]
    found = PEERS.get(below) or PEERS.get(plain) or PEERS.get(plain.lower())
    return [found] if found else []


def _of_ours(name: str, above: list[str]) -> list[str]:
    """Keys of ours with this last part; of those in the same section alone, if there are any."""
    ours = _last_parts().get(_plain(name), [])
    return [key for key in ours if key.split(".")[0] in above] or ours


def _plain(name: str) -> str:
    return name.rpartition(".")[2].strip().replace("-", "_")


@cache
def _last_parts() -> dict[str, list[str]]:
    """Last part of every key of the tree -> the keys that end with it."""
    found: dict[str, list[str]] = {}

    def walk(cls: type, key: str) -> None:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            child, hint = join(key, field.name), hints[field.name]
            if dataclasses.is_dataclass(hint):
                assert isinstance(hint, type)
                walk(hint, child)
            if key:
                found.setdefault(field.name, []).append(child)

    walk(RunConfig, "")
    return found
