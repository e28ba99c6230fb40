"""The private names of Megatron-Core that mcore/ leans on exist and mean what we read in 0.16.1.

`sfpo_megatron.mcore.private_names` lists them. When an upstream release moves one, the failure here
says which; the numeric tests then say no more than "wrong". Not exercised: names of CUDA alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, EP2, TE1, TE_SP2, TP1, TP2, on_ranks
from made.policies import OVERLAP, live_params, offloaded_policy

if TYPE_CHECKING:
    from workbench import Workbench


def parameters_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@on_ranks(TP1, DP2, dtype=["float32", "bfloat16"])
def test_distributed_optimizer(bench: Workbench, dtype: str) -> None:
    """mcore/shards/: shard lists, model_chunks, bucket groups, gather handles."""
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    policy = bench.policy(dtype=dtype)
    assert isinstance(policy.optimizer, ChainedOptimizer)
    (member,) = policy.optimizer.chained_optimizers
    assert isinstance(member, DistributedOptimizer) and member.is_stub_optimizer is False
    masters = [t for group in member.shard_fp32_from_float16_groups for t in group]
    plain = [t for group in member.shard_fp32_groups for t in group]
    assert all(t.dtype == torch.float32 for t in masters + plain)
    assert bool(masters) == (dtype == "bfloat16") and bool(plain) == (dtype == "float32")
    buffers = [b.param_data for chunk in policy.chunks for b in chunk.buffers]
    ends = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers]
    assert all(any(lo <= t.data_ptr() < hi for lo, hi in ends) for t in plain), "no longer aliases"
    assert not any(any(lo <= t.data_ptr() < hi for lo, hi in ends) for t in masters)
    stepped = {p for group in member.optimizer.param_groups for p in group["params"]}
    assert stepped == set(masters + plain), "Adam steps something else than the main shards"
    assert len(member.model_chunks) == len(policy.chunks)
    assert all(any(m is c for c in policy.chunks) for m in member.model_chunks)
    assert callable(member._copy_main_params_to_model_params)
    for chunk in policy.chunks:
        assert chunk.bucket_groups and chunk.expert_parallel_bucket_groups == []
        for group in chunk.bucket_groups:
            assert group.param_gather_handle is None
            assert isinstance(group.param_gather_dispatched, bool)
            assert isinstance(group.ddp_config.overlap_param_gather, bool)
            assert parameters_of(group.start_param_sync) == {"force_sync"}


@on_ranks(DP2)
def test_param_gather_flags(bench: Workbench) -> None:
    """`param_gather_dispatched`: false after a step, true after a gather; the handle is outstanding
    only between. ParamGathers decides by it."""
    policy = bench.policy(ddp=OVERLAP)
    groups = [g for chunk in policy.chunks for g in chunk.bucket_groups]
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    run_pass()
    assert not any(g.param_gather_dispatched for g in groups), "reset moved out of finish_grad_sync"
    assert all(g.param_gather_handle is None for g in groups)
    for group in groups:
        group.start_param_sync()
        assert group.param_gather_dispatched and group.param_gather_handle is not None
        group.param_gather_handle.wait()
        group.param_gather_handle = None
    policy.shards.params_ready()
    assert all(g.param_gather_dispatched and g.param_gather_handle is None for g in groups)


@on_ranks(TP1)
def test_undistributed_optimizers(bench: Workbench) -> None:
    """mcore/shards/undistributed.py and refused.py."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    policy = bench.policy(dtype="bfloat16", ddp={"use_distributed_optimizer": False})
    (member,) = policy.optimizer.chained_optimizers
    assert member.fp32_from_float16_groups and hasattr(member, "fp32_from_fp32_groups")
    copied = zip(member.float16_groups, member.fp32_from_float16_groups, strict=True)
    for params, masters in copied:
        assert all(map(torch.equal, (p.float() for p in params), masters))
    assert issubclass(FP32Optimizer, MegatronOptimizer)
    for kind in (type(member), FP32Optimizer):
        assert "self.init_state_fn(self.optimizer, " in inspect.getsource(kind.sharded_state_dict)
    assert callable(member.init_state_fn)
    config = {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert config >= {
        "use_precision_aware_optimizer", "optimizer_cpu_offload", "loss_scale", "clip_grad",
        "reuse_grad_buf_for_mxfp8_param_ag", "fp16", "overlap_param_gather", "main_params_dtype",
        "overlap_param_gather_with_optimizer_step", "optimizer", "exp_avg_dtype",
    }  # fmt: skip
    ddp = {field.name for field in dataclasses.fields(DistributedDataParallelConfig)}
    assert ddp >= {"fp8_param_gather", "use_megatron_fsdp", "align_param_gather"}


@on_ranks(TE1)
def test_precision_aware_optimizer(bench: Workbench) -> None:
    """mcore/shards/precision_aware.py: whose params FusedAdam steps, and its constructor. That the
    stand-in's state contract is TransformerEngine's is what its docstring says, not tested."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    policy = bench.policy(dtype="bfloat16", optimizer={"use_precision_aware_optimizer": True})
    (member,) = policy.optimizer.chained_optimizers
    assert isinstance(member, DistributedOptimizer)
    assert member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 is True
    adam = member.optimizer
    assert adam.store_param_remainders and adam.master_weights and adam.use_decoupled_grad
    assert adam.exp_avg_dtype == adam.exp_avg_sq_dtype == torch.float32
    assert parameters_of(adam.initialize_state) == {"param", "store_param_remainders"}
    shards = [p for group in member.shard_float16_groups for p in group]
    assert shards and all(p.dtype == torch.bfloat16 and p.dim() == 1 for p in shards)
    stepped = [p for group in adam.param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in shards}
    buffers = [b.param_data for chunk in policy.chunks for b in chunk.buffers]
    ends = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers]
    assert all(any(lo <= p.data_ptr() < hi for lo, hi in ends) for p in shards), "no longer views"
    before = [p.clone() for p in shards]
    member._copy_main_params_to_model_params()  # leaves model params to FusedAdam
    assert all(torch.equal(a, b) for a, b in zip(before, shards, strict=True))


@on_ranks(TE1)
def test_weight_gradients_that_te_accumulates(bench: Workbench) -> None:
    """mcore/device_choices.py: every TE linear is told, the output layer, Megatron's own, is not;
    DDP leaves the gradient alone that autograd then has (the stand-in's is NaN)."""
    from sfpo_megatron.mcore.model import unwrapped

    policy = bench.policy(dtype="bfloat16")
    model = unwrapped(policy.chunks[0])
    layer = model.decoder.layers[0]
    linears = [layer.self_attention.linear_qkv, layer.self_attention.linear_proj]
    linears += [layer.mlp.linear_fc1, layer.mlp.linear_fc2]
    assert all(linear.fuse_wgrad_accumulation is True for linear in linears)
    assert not hasattr(model.output_layer, "fuse_wgrad_accumulation")
    assert model.output_layer.gradient_accumulation_fusion is False
    bench.one_pass(policy, bench.prepared(policy))()
    for linear in linears:
        assert linear.weight.grad_added_to_main_grad
        assert linear.weight.main_grad.isfinite().all() and linear.weight.main_grad.any()


@on_ranks(TP1)
def test_cpu_offloaded_optimizer(bench: Workbench) -> None:
    """mcore/shards/hybrid.py and steppers.py: the maps; the sub-optimizers' states are its own."""
    policy = offloaded_policy(bench, 0.5)
    (member,) = policy.optimizer.chained_optimizers
    hybrid = member.optimizer
    outer = [p for group in hybrid.param_groups for p in group["params"]]
    assert set(outer) == {t for group in member.shard_fp32_from_float16_groups for t in group}
    assert hybrid.param_to_inner_param.keys() == set(outer)
    parts = [member._get_model_param_range_map(p)["param"].size for p in live_params(policy)]
    assert sorted(parts) == sorted(p.numel() for p in outer)
    inner = list(hybrid.param_to_inner_param.values())
    stepped = [p for s in hybrid.sub_optimizers for g in s.param_groups for p in g["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in inner}
    assert all(p.dtype == torch.float32 for p in inner)
    copied = [p for p in outer if hybrid.param_to_inner_param[p] is not p]
    assert {id(p) for p in copied} == {id(p) for p in hybrid.gpu_params_map_cpu_copy}
    bench.one_pass(policy, bench.prepared(policy))()
    for stepper in hybrid.sub_optimizers:
        for param, state in stepper.state.items():
            assert hybrid.state[hybrid.inner_param_to_orig_param[param]] is state


@on_ranks(TP1)
def test_local_layer_spec(bench: Workbench) -> None:
    """mcore/local_spec.py and model.py: where the spec keeps what we replace; its names' map."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    for owner, name in [
        (layer, "input_layernorm"), (layer, "pre_mlp_layernorm"), (attention, "core_attention"),
        (attention, "q_layernorm"), (attention, "k_layernorm"),
    ]:  # fmt: skip
        assert hasattr(owner, name), name
    assert layer.sharded_state_dict_keys_map == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    assert parameters_of(TransformerBlockSubmodules) == {"layer_specs", "layer_norm"}
    assert {"config", "vp_stage"} <= parameters_of(get_num_layers_to_build)
    names = {field.name for field in dataclasses.fields(PackedSeqParams)}
    assert names >= {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
    config = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert config >= {"window_size", "softmax_type", "variable_seq_lengths", "overlap_p2p_comm",
                      "batch_p2p_comm", "perform_initialization"}  # fmt: skip
    built = bench.policy("qwen3_untied").chunks[0].module.decoder.layers
    assert [block.layer_number for block in built] == [1, 2, 3, 4]
    assert built[0].submodules_config.sharded_state_dict_keys_map


@on_ranks(TP2, TE_SP2, full=["TExTP2+SP"])
def test_tensor_parallel_marks(bench: Workbench) -> None:
    """mcore/weights.py sets what the gradient norm and the optimizer's shards read."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.tensor_parallel import layers

    from sfpo_megatron.families.table import rule_by_name
    from sfpo_megatron.mcore.model import named_params

    assert set(layers._MODEL_PARALLEL_ATTRIBUTE_DEFAULTS) >= {
        "tensor_model_parallel", "partition_dim", "partition_stride",
    }  # fmt: skip
    reader = inspect.getsource(sys.modules[finalize_model_grads.__module__])
    mark = "sequence_parallel"  # set on the norms' weights by mcore/local_spec.py
    assert f'getattr(param, "{mark}", False)' in reader.replace("'", '"')
    policy = bench.policy("qwen2_tied")
    table = rule_by_name(policy.shape)
    for name, param in named_params(policy.chunks):
        sharded = table[name].tp_dim is not None
        assert param.tensor_model_parallel is sharded, name
        counted = layers.param_is_not_tensor_parallel_duplicate(param)
        assert counted == (sharded or policy.layout.tensor_rank == 0), name
    (member,) = policy.optimizer.chained_optimizers
    shards = [t for group in member.shard_fp32_groups for t in group]
    assert any(shard.tensor_model_parallel for shard in shards)


@on_ranks(EP2)
def test_experts(bench: Workbench) -> None:
    """mcore/experts.py, aux_losses.py, and what decides which optimizer a param joins."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.router import TopKRouter

    from sfpo_megatron.mcore.model import unwrapped

    spec = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
    assert "pre_mlp_layernorm." in spec.submodules.sharded_state_dict_keys_map
    assert "padding_mask" in parameters_of(GPTModel.forward)
    policy = bench.policy("qwen3moe_untied", transformer={"moe_z_loss_coeff": 1e-3})
    (chunk,) = policy.chunks
    layer = unwrapped(chunk).decoder.layers[0].mlp
    first = 2 * policy.layout.expert_rank
    assert layer.local_expert_indices == [first, first + 1]
    assert isinstance(layer.router, TopKRouter)
    assert unwrapped(chunk).pre_process is True
    assert unwrapped(chunk).rotary_pos_emb.inv_freq.shape == (policy.shape.head_dim // 2,)
    assert not hasattr(unwrapped(chunk).config, "yarn_rotary_scaling_factor")
    assert layer.router.config is unwrapped(chunk).config
    assert layer.router.calculate_per_token_loss is True  # set by AuxLosses
    assert layer.router.is_aux_loss_enabled() is False
    of_experts = {
        f"mlp.experts.local_experts.{i}.linear_fc{n}.weight" for i in (0, 1) for n in (1, 2)
    }
    for name, param in unwrapped(chunk).decoder.layers[0].named_parameters():
        assert getattr(param, "allreduce", True) == (name not in of_experts), name
        of_experts.discard(name)
    assert not of_experts
    assert chunk.expert_parallel_buffers and chunk.expert_parallel_bucket_groups
    groups = [g for m in policy.optimizer.chained_optimizers for g in m.param_groups]
    assert {group["is_expert_parallel"] for group in groups} == {False, True}


@on_ranks(TP1, TE1)
def test_latent_attention(bench: Workbench) -> None:
    """mcore/local_spec.py: what the module's globals decide; mcore/experts.py: the biases."""
    import megatron.core.transformer.multi_latent_attention as mla
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer.moe.router import TopKRouter

    assert isinstance(mla.TELinear, type) == bench.layout.te
    assert hasattr(mla, "QKNormConfigResolver") != references.PLAIN_QUERIES
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=True)
    attention = spec.submodules.self_attention.submodules
    for name in ("linear_q_down_proj", "linear_kv_down_proj", "q_layernorm", "kv_layernorm"):
        assert hasattr(attention, name), name
    assert not spec.submodules.sharded_state_dict_keys_map
    policy = bench.policy("deepseek_untied", dtype="bfloat16")
    assert mla.HAVE_TE is bench.layout.te and mla.Linear is Linear
    layers = policy.chunks[0].module.module.decoder.layers
    kind = mla.TELinear if bench.layout.te else Linear
    assert all(type(layer.self_attention.linear_kv_down_proj) is kind for layer in layers)
    assert not hasattr(layers[0].mlp, "router")
    for layer in layers[1:]:
        router = layer.mlp.router
        assert isinstance(router, TopKRouter) and "expert_bias" in dict(router.named_buffers())
        assert router.expert_bias.dtype == torch.float32


@on_ranks(TP1)
def test_schedules_and_setup(bench: Workbench) -> None:
    """mcore/passes.py and setup.py: arguments given by name, hooks of the config."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    assert parameters_of(get_forward_backward_func()) >= {
        "forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length",
        "micro_batch_size", "forward_only", "collect_non_loss_data",
    }  # fmt: skip
    hooks = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert hooks >= {
        "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func",
        "param_sync_func",
    }  # fmt: skip
    assert "fp32_output" in parameters_of(Float16Module.forward)
    assert "disable_bucketing" in parameters_of(DistributedDataParallel.__init__)
    assert list(parameters_of(finalize_model_grads)) and callable(get_megatron_optimizer)
    assert parameters_of(OptimizerParamScheduler.__init__) >= {
        "init_lr", "max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style",
        "start_wd", "end_wd", "wd_incr_steps", "wd_incr_style",
    }  # fmt: skip
    assert "ignore_virtual" in parameters_of(parallel_state.is_pipeline_first_stage)
    assert callable(tensor_parallel.model_parallel_cuda_manual_seed)
    successful, norm, _ = _null_step(bench)
    assert successful is True and norm >= 0


def _null_step(bench: Workbench) -> tuple[bool, float, Any]:
    """optimizer.step() returns (successful, gradient norm, number of zeros)."""
    policy = bench.policy()
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    return policy.optimizer.step()


@on_ranks(TP1)
def test_checkpoint_hooks(bench: Workbench) -> None:
    """mcore/optimizer_state.py and writing.py: the getter and the setter that the optimizer calls
    on itself, and the writer's queue, looked up when a save is planned."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    policy = bench.policy()
    bench.one_pass(policy, bench.prepared(policy))()
    (member,) = policy.optimizer.chained_optimizers
    assert parameters_of(member._get_main_param_and_optimizer_states) == {"model_param"}
    assert parameters_of(member._set_main_param_and_optimizer_states) == {"model_param", "tensors"}
    for param, (group, index) in member.model_param_group_index_map.items():
        found = member._get_main_param_and_optimizer_states(param)
        assert found["param"] is member.optimizer.param_groups[group]["params"][index]
        assert {"exp_avg", "exp_avg_sq", "step"} < set(found)
    for name, caller in (
        ("get", DistributedOptimizer.get_parameter_state_dp_zero),
        ("set", DistributedOptimizer.load_parameter_state_from_fully_reshardable),
    ):
        assert f"self._{name}_main_param_and_optimizer_states(" in inspect.getsource(caller)
    assert callable(HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo)
    assert callable(HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers)
    kept = filesystem_async._results_queue
    try:
        filesystem_async._results_queue = self_made = object()
        name = "_get_write_results_queue"  # without the underscore in 0.19
        get = getattr(filesystem_async, name, None) or getattr(filesystem_async, name[1:])
        assert get() is self_made
    finally:
        filesystem_async._results_queue = kept
    save = torch_strategy.TorchDistSaveShardedStrategy.async_save
    if "async_strategy" in parameters_of(save):  # 0.19
        assert "if not _logged_mcore_async_deprecation:" in inspect.getsource(save)
        assert isinstance(torch_strategy._logged_mcore_async_deprecation, bool)


@on_ranks(DP2)
def test_buffers_as_they_are_gathered(bench: Workbench) -> None:
    """mcore/gathered_states.py: where a param stands in its buffer, its bucket, its rank's part."""
    import torch.distributed as dist

    policy = bench.policy(ddp=OVERLAP | {"bucket_size": 20_000})
    (member,) = policy.optimizer.chained_optimizers
    for group in (member.data_parallel_group, member.data_parallel_group_gloo):
        assert (group.size(), group.rank()) == (2, bench.rank)
    assert dist.get_backend(member.data_parallel_group_gloo) == "gloo"
    for buffer, ranges in zip(member.buffers, member.gbuf_ranges, strict=True):
        ((_, buckets),) = ranges.items()
        assert len(buckets) == len(buffer.buckets) > 2
        for number, (bucket, found) in enumerate(zip(buffer.buckets, buckets, strict=True)):
            length = bucket.grad_data.numel() // 2
            assert bucket.grad_data.numel() % 2 == 0
            for param, of in found["param_map"].items():
                start, end, home = buffer.param_index_map[param]
                assert (end - start, home) == (param.numel(), number)
                mine = bucket.offset + bench.rank * length
                begin, stop = max(0, start - mine), min(length, end - mine)
                assert (of["gbuf_local"].start, of["gbuf_local"].end) == (begin, stop)
