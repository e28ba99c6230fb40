"""The internals of Megatron-Core that mcore/ reaches into, all of them, with what they are to us.

Megatron-Core documents no Python API below its constructors, config fields and functions; these
attributes and methods may move in any release. tests/dist/test_private_names.py has a contract test
for each, run on megatron-core 0.16.1 (`make test`) and on the newest (`make test-mcore-latest`);
tests/unit/test_private_names.py finds what is not listed here.
"""

from __future__ import annotations

PRIVATE_NAMES: dict[str, str] = {
    # optimizers
    "chained_optimizers": "ChainedOptimizer: its members, dense and expert",
    "is_stub_optimizer": "MegatronOptimizer: this rank has no param of its kind",
    "shard_fp32_from_float16_groups": "DistributedOptimizer: fp32 shards of bf16 or fp16 params",
    "shard_fp32_groups": "DistributedOptimizer: views of fp32 params, no copies",
    "float16_groups": "Float16OptimizerWithFloat16Params: bf16 or fp16 model params, by group",
    "fp32_from_float16_groups": "Float16OptimizerWithFloat16Params: fp32 main params",
    "fp32_from_fp32_groups": "Float16OptimizerWithFloat16Params: params that are fp32 themselves",
    "_copy_main_params_to_model_params": "both: after an edit, before the gather",
    "_get_model_param_range_map": "DistributedOptimizer: this rank's part of a model param",
    "init_state_fn": "optimizers without sharding: called to plan a load; None unless Adam",
    "model_chunks": "DistributedOptimizer: the DDP chunks whose params it gathers",
    "use_precision_aware_optimizer_no_fp8_or_ds_fp8": "FusedAdam holds main params",
    "param_to_inner_param": "HybridDeviceOptimizer: outer param -> the one that Adam steps",
    "sub_optimizers": "HybridDeviceOptimizer: those that really step, on either device",
    # checkpoints
    "_get_main_param_and_optimizer_states": "DistributedOptimizer: what it saves of a model param",
    "_set_main_param_and_optimizer_states": "DistributedOptimizer: puts it back",
    "model_param_group_index_map": "DistributedOptimizer: model param -> its group, its place",
    "_sync_sub_optimizers_state_to_hdo": "HybridDeviceOptimizer: shows the states as its own",
    "_sync_hdo_state_to_sub_optimizers": "HybridDeviceOptimizer: called at the end of a load",
    "gbuf_ranges": "DistributedOptimizer: which part of each bucket of each buffer is this rank's",
    "param_index_map": "param-and-grad buffer: param -> start, end, bucket; padding included",
    "grad_data": "bucket: padded to what data-parallel ranks divide",
    "offset": "bucket: its start in the buffer",
    "data_parallel_group": "DistributedOptimizer: the ranks that share its buffers",
    "data_parallel_group_gloo": "DistributedOptimizer: the same over gloo, or None",
    "_results_queue": "dist_checkpointing's writer: where a writing process leaves its results",
    "_logged_mcore_async_deprecation": "dist_checkpointing 0.19: it has named another",
    # TransformerEngine's FusedAdam, and its state's "master_param"
    "store_param_remainders": "main params of bf16 params are int16 remainders",
    "initialize_state": "makes a param's state before its first step",
    # TransformerEngine's layers
    "fuse_wgrad_accumulation": "read in each forward: the backward adds to the weight's main_grad",
    # DistributedDataParallel and its bucket groups
    "ddp_config": "read by optimizer.step() to decide whether to gather",
    "overlap_param_gather": "ddp_config: true during a step makes it leave its gather due",
    "bucket_groups": "DDP chunk: what is gathered, in this order",
    "expert_parallel_bucket_groups": "DDP chunk: the same for experts",
    "param_gather_handle": "bucket group: an outstanding gather, or None",
    "param_gather_dispatched": "bucket group: false while a gather is due",
    # the model
    "decoder": "GPTModel: its layers",
    "rotary_pos_emb": "GPTModel: its rotary embedding, on every stage",
    "inv_freq": "RotaryEmbedding: radians a position, [head_dim / 2]",
    "yarn_rotary_scaling_factor": "TransformerConfig, not declared: SelfAttention looks for it",
    "pre_process": "GPTModel: this chunk has the embedding",
    "layer_number": "TransformerLayer: global, from 1",
    "submodules_config": "TransformerLayer: has sharded_state_dict_keys_map",
    "sharded_state_dict_keys_map": "names of the local spec -> names in checkpoints",
    # experts
    "local_expert_indices": "MoE layer: global indices of this rank's experts",
    "is_aux_loss_enabled": "TopKRouter: it has a load-balancing loss",
    "calculate_per_token_loss": "TopKRouter: it multiplies its losses by its tokens",
    "expert_bias": "TopKRouter: a buffer in fp32, added to the scores by which experts are chosen",
    # multi-head latent attention: its module's globals
    "HAVE_TE": "whether it compares its linears with TransformerEngine's",
    "TELinear": "TransformerEngine's class; a mock (0.16) or None (0.19) without it",
    "QKNormConfigResolver": "from 0.19 on: refuses latent keys beside queries that are not",
    "Linear": "a plain linear, accepted for what makes the short vectors",
    # attributes of params that Megatron reads
    "tensor_model_parallel": "gradient norm: sharded, so not counted once per tensor rank",
    "partition_dim": "the sharded dimension",
    "partition_stride": "1, or interleaved",
    "sequence_parallel": "finalize_model_grads adds up these gradients over tensor ranks",
}
