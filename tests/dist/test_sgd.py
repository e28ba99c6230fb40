"""SFPO on Megatron's SGD: the contract of every optimizer, its momentum, and a checkpoint.

Not exercised: TransformerEngine's and Apex's FusedSGD (TE's name is, of a class of torch's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from harness import DP2, TE1, TP1, TP2, on_ranks
from made.bits import all_same_bits, clones
from made.checkpoints import load, save
from repositions import moved_by_a_null_step
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

DTYPES = ["float32", "bfloat16"]


def sgd_policy(bench: Workbench, dtype: str) -> Any:
    policy = bench.policy(
        dtype=dtype, ddp={"use_distributed_optimizer": False}, optimizer={"optimizer": "sgd"}
    )
    (member,) = policy.optimizer.chained_optimizers
    kind = type(member.optimizer)
    assert kind.__name__ == "FusedSGD" if bench.layout.te else kind is torch.optim.SGD
    assert all(group["momentum"] == 0.9 for group in member.optimizer.param_groups)
    return policy


def state_of(policy: Any) -> list[Tensor]:
    """Main params and momentum."""
    return clones([*policy.shards.tensors(), *policy.shards.moments()])


@on_ranks(TP1, DP2, TE1, dtype=DTYPES, only=["DP2-bfloat16", "TP1-float32"])
def test_a_null_step_after_a_reposition_changes_nothing(bench: Workbench, dtype: str) -> None:

    assert not moved_by_a_null_step(bench, sgd_policy(bench, dtype))


@on_ranks(TP1, DP2, dtype=DTYPES, only=["TP1-bfloat16"])
def test_the_planner_counts_what_it_holds(bench: Workbench, dtype: str) -> None:
    """Main params and momentum, of all params on every rank."""
    from sfpo_megatron.planner.memory import rank_memory

    policy = sgd_policy(bench, dtype)
    bench.one_pass(policy, bench.prepared(policy))()
    planned = rank_memory(policy.shape, bench.config_of(policy), spec="local")
    main = sum(t.nbytes for t in policy.shards.tensors()) if dtype == "bfloat16" else 0
    moments = sum(t.nbytes for t in policy.shards.moments())
    assert (planned.main_params, planned.optimizer) == (main, moments)


@on_ranks(TP1, TE1, full=["TE1"])
def test_momentum_is_put_back(bench: Workbench) -> None:
    """alpha=0 and `moments: restore` is one plain pass; without it it is not."""
    from sfpo_megatron.snapshots.moments import MomentSnapshot

    found = []
    for num_fast_passes, restored in ((2, True), (0, True), (2, False)):
        policy = sgd_policy(bench, "float32")
        run_pass = bench.one_pass(policy, bench.prepared(policy))
        run_pass()  # from here on there is momentum
        snapshot: Any = SlowSnapshot(policy.shards)
        if restored:
            snapshot = MomentSnapshot(snapshot, policy.shards, mode="restore")
        sfpo_step(run_pass, snapshot, num_fast_passes=num_fast_passes, alpha=0.0)
        assert policy.shards.step_counts() == []
        found.append(state_of(policy))
    assert len(found[0]) == 2 * len(list(policy.shards.tensors()))
    assert all_same_bits(found[0], found[1]) and not all_same_bits(found[0], found[2])


@on_ranks(TP1, TP2, TE1, dtype=DTYPES, only=["TP1-float32", "TP2-bfloat16"])
def test_training_goes_on_as_if_it_had_not_stopped(bench: Workbench, dtype: str) -> None:
    """Also from a checkpoint of before the first step, where there is no momentum."""

    for num_steps in (0, 1):
        policy = sgd_policy(bench, dtype)
        for step in range(num_steps):
            bench.one_pass(policy, bench.prepared(policy, step))()
        directory = save(bench, policy, f"sgd-{bench.layout.name}-{dtype}-{num_steps}")
        loaded = sgd_policy(bench, dtype)
        load(loaded, directory)
        for step in (1, 2):
            found, expected = state_of(loaded), state_of(policy)
            assert len(found) == 2 * len(list(policy.shards.tensors()))
            assert all_same_bits(found, expected), (num_steps, step)
            for each in (policy, loaded):
                bench.one_pass(each, bench.prepared(each, step))()
