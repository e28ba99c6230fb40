"""SFPO on a mixture of experts: two optimizers in a chain, both repositioned, shards all covered.

Its losses and weights are in test_training.py. Not exercised here: experts under
TransformerEngine's grouped GEMM (test_te_spec.py has its names), CUDA streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from harness import EP2, EP2DP4, EP2PP2, SP2EP2, TP1, on_ranks
from made.policies import OVERLAP, gathered_main_params, stale
from repositions import moved_by_a_null_step, watched_steps
from safetensors.torch import load_file

if TYPE_CHECKING:
    from workbench import Workbench

MODEL = references.TRAINED_MOE


@on_ranks(EP2, EP2DP4, dtype=["float32", "bfloat16"], full=["DP4xEP2-float32", "DP4xEP2-bfloat16"])
def test_two_optimizers_whose_shards_cover_every_weight_once(bench: Workbench, dtype: str) -> None:
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    policy = bench.policy(MODEL, dtype=dtype)
    assert isinstance(policy.optimizer, ChainedOptimizer)
    dense, experts = policy.optimizer.chained_optimizers
    assert isinstance(dense, DistributedOptimizer) and isinstance(experts, DistributedOptimizer)
    ours = [(shard.data_ptr(), shard.numel()) for shard in policy.shards.tensors()]
    stepped = [
        (p.data_ptr(), p.numel())
        for member in (dense, experts)
        for group in member.optimizer.param_groups
        for p in group["params"]
    ]
    assert len(set(ours)) == len(ours) and sorted(ours) == sorted(stepped)
    # Each element of the model once, over all ranks: experts on their expert-data-parallel ranks.
    total = policy.control.sum(torch.tensor(sum(size for _, size in ours)))
    file = load_file(bench.directory / MODEL / "model.safetensors")
    assert total == sum(tensor.numel() for tensor in file.values())
    pairs = gathered_main_params(policy)  # asserts one owner for each element
    assert len(pairs) == sum(1 for chunk in policy.chunks for _ in chunk.parameters())
    assert all(torch.equal(live, main.to(live.dtype)) for live, main in pairs)


@on_ranks(
    *(EP2, EP2DP4, SP2EP2, EP2PP2),
    overlap=[False, True],
    only=["DP2xEP2-True"],
)
def test_three_bf16_steps_leave_no_stale_weight(bench: Workbench, overlap: bool) -> None:
    """After each reposition every param, experts included, is bf16(lerp of its main shard)."""
    policy = bench.policy(MODEL, dtype="bfloat16", ddp=OVERLAP if overlap else None)
    shards = watched_steps(bench, policy, references.NUM_STEPS)
    assert shards.published == references.NUM_STEPS
    policy.shards.params_ready()
    assert stale(policy) == 0


@on_ranks(
    *(TP1, EP2, EP2DP4),
    overlap=[False, True],
    dtype=["bfloat16", "float32"],
    only=["DP2xEP2-True-bfloat16", "DP2xEP2-False-float32"],
)
def test_a_null_step_after_a_reposition_changes_nothing(
    bench: Workbench, overlap: bool, dtype: str
) -> None:
    policy = bench.policy(MODEL, dtype=dtype, ddp=OVERLAP if overlap else None)
    assert not moved_by_a_null_step(bench, policy)


@on_ranks(EP2, kind=["float32", "bfloat16"])
def test_optimizers_without_sharding(bench: Workbench, kind: str) -> None:
    """FP32Optimizer and Float16OptimizerWithFloat16Params, one for the experts and one for the
    rest."""
    policy: Any = bench.policy(MODEL, dtype=kind, ddp={"use_distributed_optimizer": False})
    assert len(policy.optimizer.chained_optimizers) == 2
    assert not moved_by_a_null_step(bench, policy)
