"""fp16 params under the DistributedOptimizer, with Megatron's dynamic loss scale.

An overflow inside a fast pass is skipped on every rank, counted, and the SFPO step goes on. Not
exercised here: fp16 on CUDA, where Megatron fuses the unscaling.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, TP2, on_ranks
from made.bits import all_same_bits, clones, same_bits
from made.policies import OVERLAP, gathered_main_params

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

OVERFLOWING = 2.0**40


def stale(policy: Any) -> int:
    """How many live model params are not fp16(main param)."""
    pairs = gathered_main_params(policy)
    assert all(live.dtype == torch.float16 for live, _ in pairs)
    return sum(not same_bits(live, main.half()) for live, main in pairs)


@on_ranks(DP2, TP2, overlap=[False, True], only=["DP2-True"])
def test_three_steps_with_an_overflow_in_a_fast_pass(bench: Workbench, overlap: bool) -> None:
    """The second fast pass of the second step starts at a loss scale of 2^40: both of its
    minibatches overflow, the scale is halved (hysteresis 2: at the second), and so on until the
    gradients fit again. What is skipped leaves the weights alone."""
    policy = bench.policy(
        dtype="float16",
        ddp=OVERLAP if overlap else None,
        optimizer={"initial_loss_scale": 2.0**10, "loss_scale_window": 1000},
    )
    (member,) = policy.optimizer.chained_optimizers
    snapshot = SlowSnapshot(policy.shards)
    for step in range(references.NUM_STEPS):
        inner = bench.one_pass(policy, bench.prepared(policy, step))
        weights = [clones(policy.shards.tensors())]

        def run_pass(inner: Any = inner, step: int = step, weights: Any = weights) -> Any:
            if step == 1 and len(weights) == 2:
                member.grad_scaler._scale.fill_(OVERFLOWING)
            if step == 1 and len(weights) == 3:
                member.grad_scaler._scale.fill_(2.0**10)
            result = inner()
            weights.append(clones(policy.shards.tensors()))
            return result

        results = sfpo_step(run_pass, snapshot, num_fast_passes=references.K, alpha=0.8)
        skipped = [result.num_skipped for result in results]
        assert skipped == ([0, references.MINIBATCHES, 0, 0] if step == 1 else [0, 0, 0, 0])
        moved = [
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in itertools.pairwise(weights)
        ]
        assert moved == [True, step != 1, True, True]
        assert all(torch.isfinite(t).all() for t in policy.shards.tensors())
        norms = [m.grad_norm for r in results for m in r.minibatches if not m.skipped]
        assert min(norms) > 0
    policy.shards.params_ready()
    assert stale(policy) == 0


@on_ranks(DP2)
def test_params_are_fp16_of_the_lerp(bench: Workbench) -> None:
    """And a step with lr = 0 and weight_decay = 0 after the reposition changes nothing."""
    policy = bench.policy(dtype="float16", optimizer={"initial_loss_scale": 2.0**10})
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    slow = clones(policy.shards.tensors())
    assert run_pass().num_skipped == 0
    fast = clones(policy.shards.tensors())
    snapshot.reposition(references.ALPHA)
    policy.shards.params_ready()
    lerp = [torch.lerp(s, f, references.ALPHA) for s, f in zip(slow, fast, strict=True)]
    assert not all_same_bits(lerp, fast) and all_same_bits(lerp, policy.shards.tensors())
    assert stale(policy) == 0
    live = clones(p for chunk in policy.chunks for p in chunk.parameters())
    for group in policy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    assert run_pass().num_skipped == 0
    policy.shards.params_ready()
    assert all_same_bits(lerp, policy.shards.tensors())
    assert all_same_bits(live, [p for chunk in policy.chunks for p in chunk.parameters()])
