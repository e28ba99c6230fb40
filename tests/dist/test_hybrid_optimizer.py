"""SFPO on Megatron's CPU-offloaded optimizer is SFPO on the plain one, bit for bit.

The offload branch really runs (offload.py; asserted in made/policies.py). Both sides step torch's
fused AdamW. Not exercised here: pinned memory, copies between real devices, their streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, TE1, TP1, on_ranks
from made.bits import all_same_bits, clones
from made.policies import LOSS_SCALE, PRECISION_AWARE, live_params, offloaded_policy
from repositions import moved_by_a_null_step
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench


def plain_policy(bench: Workbench, dtype: str) -> Any:
    """Megatron's DistributedOptimizer on the same AdamW kernel as the sub-optimizers."""
    policy = bench.policy(dtype=dtype, optimizer=LOSS_SCALE)
    (member,) = policy.optimizer.chained_optimizers
    assert type(member.optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in member.optimizer.param_groups)
    return policy


def sfpo_steps(bench: Workbench, policy: Any) -> list[Tensor]:
    """Main params and gathered model params after three steps."""
    snapshot = SlowSnapshot(policy.shards)
    for step in range(references.NUM_STEPS):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        results = sfpo_step(run_pass, snapshot, num_fast_passes=1, alpha=references.ALPHA)
        assert sum(result.num_skipped for result in results) == 0
    policy.shards.params_ready()
    return clones([*policy.shards.tensors(), *live_params(policy)])


@on_ranks(
    *(TP1, DP2),
    dtype=["bfloat16", "float16"],
    fraction=[0.5, 1.0],
    only=["DP2-bfloat16-0.5"],
)
def test_three_sfpo_steps_equal_the_plain_optimizer(
    bench: Workbench, dtype: str, fraction: float
) -> None:
    expected = sfpo_steps(bench, plain_policy(bench, dtype))
    assert all_same_bits(sfpo_steps(bench, offloaded_policy(bench, fraction, dtype)), expected)


@on_ranks(TP1)
def test_fp32_params_are_refused_upstream(bench: Workbench) -> None:
    """So `check` refuses them before any heavy work (config/check.py)."""
    try:
        offloaded_policy(bench, 0.5, dtype="float32")
    except ValueError as error:
        assert "non-leaf" in str(error), error
    else:
        raise AssertionError("Megatron offloads fp32 params now: bind them and test them")


@on_ranks(TE1, fraction=[0.5, 1.0], only=["TE1-0.5"])
def test_precision_aware_offload_equals_offload(bench: Workbench, fraction: float) -> None:
    """Then the outer params are the bf16 shards themselves, with no fp32 shard between. On the GPU
    side TransformerEngine's Adam (its stand-in) steps, with its count in the param group."""
    expected = sfpo_steps(bench, offloaded_policy(bench, fraction))
    policy = offloaded_policy(bench, fraction, **PRECISION_AWARE)
    (member,) = policy.optimizer.chained_optimizers
    outer = {p.dtype for group in member.optimizer.param_groups for p in group["params"]}
    assert outer == {torch.bfloat16}
    assert all_same_bits(sfpo_steps(bench, policy), expected)


@on_ranks(TP1, DP2, only=["DP2"])
def test_a_null_step_after_a_reposition_changes_nothing(bench: Workbench) -> None:
    """And it does with the shards that Megatron calls main: the test can fail."""
    from sfpo_megatron.mcore.shards.distributed import DistributedMainParams

    assert not moved_by_a_null_step(bench, offloaded_policy(bench, 0.5))
    policy = offloaded_policy(bench, 0.5, bound=DistributedMainParams)
    assert moved_by_a_null_step(bench, policy), "HybridMainParams has become unnecessary"


@on_ranks(TP1, TE1, only=["TE1"])
def test_moments_and_step_counts_are_put_back(bench: Workbench) -> None:
    """alpha=0 and `moments: restore` is one plain pass: sub-optimizers on either side, torch's step
    tensors and (TE1) TransformerEngine's counts in the param groups."""
    from sfpo_megatron.snapshots.moments import MomentSnapshot

    found = []
    for num_fast_passes in (2, 0):
        policy = offloaded_policy(bench, 0.5)
        run_pass = bench.one_pass(policy, bench.prepared(policy))
        run_pass()  # from here on there are moments
        counts = policy.shards.step_counts()
        assert set(counts) == {float(references.MINIBATCHES)}
        snapshot = MomentSnapshot(SlowSnapshot(policy.shards), policy.shards, mode="restore")
        sfpo_step(run_pass, snapshot, num_fast_passes=num_fast_passes, alpha=0.0)
        assert set(policy.shards.step_counts()) == {2.0 * references.MINIBATCHES}
        assert len(policy.shards.step_counts()) == len(counts)
        hybrid = policy.optimizer.chained_optimizers[0].optimizer
        assert len(policy.shards.moments()) == 2 * len(hybrid.param_to_inner_param)
        found.append(clones([*policy.shards.tensors(), *policy.shards.moments()]))
    assert all_same_bits(*found)
