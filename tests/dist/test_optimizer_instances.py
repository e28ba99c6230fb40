"""num_distributed_optimizer_instances: shards within an instance, gradients summed over instances.

Every instance holds the same main params and edits them alike, so nothing is special to SFPO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
from harness import DP2, on_ranks
from made.bits import all_same_bits, clones
from made.policies import OVERLAP
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench


def trained_params(bench: Workbench, ddp: dict[str, Any]) -> list[Tensor]:
    """Two SFPO steps; Megatron's parallel state is made anew for them."""
    from megatron.core import parallel_state

    from sfpo_megatron.mcore import setup

    parallel_state.destroy_model_parallel()
    setup.init_distributed(bench.config("qwen2_tied", ddp=ddp))
    # The norm that clipping takes is a sum over shards, which instances cut in other places.
    policy = bench.policy(dtype="bfloat16", ddp=ddp, optimizer={"clip_grad": 0.0})
    snapshot = SlowSnapshot(policy.shards)
    for step in range(2):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        sfpo_step(run_pass, snapshot, num_fast_passes=1, alpha=references.ALPHA)
    policy.shards.params_ready()
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    held = sum(shard.numel() for shard in policy.shards.tensors())
    instances = ddp.get("num_distributed_optimizer_instances", 1)
    padding = 64 * len(params)
    assert abs(held - instances * sum(p.numel() for p in params) / 2) <= padding
    return clones(params)


@on_ranks(DP2, overlap=[False, True], only=[])
def test_two_instances_train_like_one(bench: Workbench, overlap: bool) -> None:
    """Bit for bit: with two ranks the sums have one order."""
    two: dict[str, Any] = {"num_distributed_optimizer_instances": 2}
    found = trained_params(bench, two | (OVERLAP if overlap else {}))
    assert all_same_bits(found, trained_params(bench, {}))
