"""SFPO on Megatron's CPU-offloaded optimizer is SFPO on the plain one, bit for bit.

The offload branch really runs (offload.py; asserted in `offloaded_policy`). Both sides step torch's
fused AdamW. Not exercised here: pinned memory, copies between real devices, their streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, TE1, TP1, on_ranks
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

LOSS_SCALE = {"initial_loss_scale": 2.0**10}  # of fp16
OFFLOAD = LOSS_SCALE | {"optimizer_cpu_offload": True, "pin_cpu_grads": False}
PRECISION_AWARE = {"use_precision_aware_optimizer": True}


def offloaded_policy(
    bench: Workbench, fraction: float, dtype: str = "bfloat16", **extra: Any
) -> Any:
    """One CPU optimizer a param at fraction 1 (overlapped copies), one for all at 0.5."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from offload import offloading

    from sfpo_megatron.mcore.shards.hybrid import HybridMainParams

    settings = OFFLOAD | {
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": fraction == 1.0,
    }
    with offloading():
        policy = bench.policy(dtype=dtype, optimizer=settings | extra)
    (member,) = policy.optimizer.chained_optimizers
    hybrid = member.optimizer
    assert isinstance(hybrid, HybridDeviceOptimizer)
    assert len(hybrid.gpu_params_map_cpu_copy) > 0, "nothing is offloaded"
    assert (hybrid.gpu_optimizer is None) == (fraction == 1.0)
    assert isinstance(policy.shards._members[0], HybridMainParams)
    return policy


def plain_policy(bench: Workbench, dtype: str) -> Any:
    """Megatron's DistributedOptimizer on the same AdamW kernel as the sub-optimizers."""
    policy = bench.policy(dtype=dtype, optimizer=LOSS_SCALE)
    (member,) = policy.optimizer.chained_optimizers
    assert type(member.optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in member.optimizer.param_groups)
    return policy


def sfpo_steps(bench: Workbench, policy: Any) -> list[Tensor]:
    """Main params and gathered model params after three steps."""
    from workbench import clones

    snapshot = SlowSnapshot(policy.shards)
    for step in range(references.NUM_STEPS):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        results = sfpo_step(run_pass, snapshot, num_fast_passes=1, alpha=references.ALPHA)
        assert sum(result.num_skipped for result in results) == 0
    policy.shards.params_ready()
    return clones([*policy.shards.tensors(), *live_params(policy)])


def live_params(policy: Any) -> list[Tensor]:
    return [p for chunk in policy.chunks for p in chunk.parameters()]


@on_ranks(
    *(TP1, DP2),
    dtype=["bfloat16", "float16"],
    fraction=[0.5, 1.0],
    only=["DP2-bfloat16-0.5"],
)
def test_three_sfpo_steps_equal_the_plain_optimizer(
    bench: Workbench, dtype: str, fraction: float
) -> None:
    from workbench import all_same_bits

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
    from workbench import all_same_bits

    expected = sfpo_steps(bench, offloaded_policy(bench, fraction))
    policy = offloaded_policy(bench, fraction, **PRECISION_AWARE)
    (member,) = policy.optimizer.chained_optimizers
    outer = {p.dtype for group in member.optimizer.param_groups for p in group["params"]}
    assert outer == {torch.bfloat16}
    assert all_same_bits(sfpo_steps(bench, policy), expected)


def null_step_keeps_theta_a(bench: Workbench, policy: Any) -> bool:
    """Whether an optimizer step with lr=0 after a reposition leaves main and model params alone."""
    from workbench import all_same_bits, clones

    run_pass = bench.one_pass(policy, bench.prepared(policy))
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    slow = clones(policy.shards.tensors())
    run_pass()
    fast = clones(policy.shards.tensors())
    snapshot.reposition(references.ALPHA)
    policy.shards.params_ready()
    masters, params = clones(policy.shards.tensors()), clones(live_params(policy))
    lerp = [torch.lerp(s, f, references.ALPHA) for s, f in zip(slow, fast, strict=True)]
    assert all_same_bits(masters, lerp) and not all_same_bits(masters, fast)
    for group in policy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    assert run_pass().num_skipped == 0
    policy.shards.params_ready()
    return all_same_bits(masters, policy.shards.tensors()) and all_same_bits(
        params, live_params(policy)
    )


@on_ranks(TP1, DP2, only=["DP2"])
def test_a_null_step_after_a_reposition_changes_nothing(bench: Workbench) -> None:
    """And it does with the shards that Megatron calls main: the test can fail."""
    from sfpo_megatron.mcore.shards.distributed import DistributedMainParams

    assert null_step_keeps_theta_a(bench, offloaded_policy(bench, 0.5))
    policy = offloaded_policy(bench, 0.5)
    policy.shards._members = [DistributedMainParams(policy.optimizer.chained_optimizers[0])]
    assert not null_step_keeps_theta_a(bench, policy), "HybridMainParams has become unnecessary"


@on_ranks(TP1, TE1, only=["TE1"])
def test_moments_and_step_counts_are_put_back(bench: Workbench) -> None:
    """alpha=0 and `moments: restore` is one plain pass: sub-optimizers on either side, torch's step
    tensors and (TE1) TransformerEngine's counts in the param groups."""
    from workbench import all_same_bits, clones

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
