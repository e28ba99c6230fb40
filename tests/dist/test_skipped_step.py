"""A non-finite gradient skips the optimizer step on every rank, is counted, and breaks nothing.

Not exercised here: how the trainer logs it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from harness import DP2, PP2, TP1, TP2, on_ranks
from made.bits import all_same_bits, clones

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy


@on_ranks(TP1, TP2, PP2, DP2, dtype=["float32", "bfloat16"])
def test_non_finite_gradient_is_skipped_and_counted(bench: Workbench, dtype: str) -> None:
    """At DP2 only one rank's microbatch is bad: both must skip."""
    _is_skipped_and_counted(bench, bench.policy(dtype=dtype))


@on_ranks(
    *(TP1, TP2, PP2, DP2),
    kind=["adam", "sgd"],
    only=["TP1-sgd", "PP2-adam", "DP2-sgd"],
)
def test_without_the_distributed_optimizer(bench: Workbench, kind: str) -> None:
    """Megatron's own optimizer of fp32 params has no grad scaler, and skips nothing."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    policy = bench.policy(ddp={"use_distributed_optimizer": False}, optimizer={"optimizer": kind})
    (member,) = policy.optimizer.chained_optimizers
    assert isinstance(member, FP32Optimizer)
    _is_skipped_and_counted(bench, policy)


@on_ranks(TP1, scale=[None, 0.0])
def test_without_a_loss_scale(bench: Workbench, scale: float | None) -> None:
    """Megatron's own words for none: without a grad scaler nothing would look at the gradients."""
    policy = bench.policy(dtype="bfloat16", optimizer={"loss_scale": scale})
    assert float(policy.optimizer.get_loss_scale()) == 1
    _is_skipped_and_counted(bench, policy)


def _is_skipped_and_counted(bench: Workbench, policy: Policy) -> None:
    minibatches = bench.prepared(policy)
    run_pass = bench.one_pass(policy, minibatches)
    assert run_pass().num_skipped == 0  # Adam has state from here on
    bad = minibatches[0].microbatches[0]
    good = bad.advantages.clone()
    if policy.layout.data_rank == 0:
        bad.advantages[bad.loss_mask] = math.inf
    before = clones(policy.shards.tensors())
    moments = clones(policy.shards.moments())
    result = bench.one_pass(policy, minibatches[:1])()
    assert result.num_skipped == 1
    (only,) = result.minibatches
    assert only.skipped and math.isnan(only.grad_norm)
    assert all_same_bits(before, policy.shards.tensors())
    assert moments and all_same_bits(moments, policy.shards.moments())
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    assert all(torch.isfinite(p).all() for p in params)
    bad.advantages.copy_(good)
    again = run_pass()  # the next clean pass is as if nothing had been
    assert again.num_skipped == 0 and all(math.isfinite(m.loss) for m in again.minibatches)
    assert not all_same_bits(before, policy.shards.tensors())
