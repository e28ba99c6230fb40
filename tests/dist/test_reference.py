"""The reference policy: its weights in and out of the model, bit for bit, and what it scores.

Not exercised here: CUDA (host copies without pinned memory), persistent buffers other than params
(an expert bias), align_param_gather.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, PP2, PP2DP2, TP1, TP2, VPP2, on_ranks
from made.bits import all_same_bits, clones
from made.policies import OVERLAP, stale
from repositions import counted_gathers
from torch import Tensor

from sfpo_megatron.config.objective import KLConfig, ObjectiveConfig
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

KL = KLConfig(coef=0.05)


def one_step(bench: Workbench, policy: Any, minibatches: Any) -> None:
    sfpo_step(
        bench.one_pass(policy, minibatches),
        SlowSnapshot(policy.shards),
        num_fast_passes=1,
        alpha=references.ALPHA,
    )


def state_of(policy: Any) -> list[Tensor]:
    """Model params and main-param shards, copied."""
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    return clones([*params, *policy.shards.tensors()])


def ref_logprobs(minibatches: Any) -> list[Tensor]:
    found = [m.ref_logprobs for minibatch in minibatches for m in minibatch.microbatches]
    return [logprobs for logprobs in found if logprobs is not None]


@on_ranks(
    *(DP2, PP2, PP2DP2, VPP2, TP2),
    only=["DP2-float32-False", "DP2-bfloat16-True", "PP2-bfloat16-False"],
    dtype=["float32", "bfloat16"],
    overlap=[False, True],
)
def test_swap(bench: Workbench, dtype: str, overlap: bool) -> None:
    """Reference log-probs are the first old_logprobs before and after training, no gather runs over
    the swapped weights, and afterwards params and main shards have their bits back. fp32 main
    shards share the params' storage. With a gather due at the start, it runs first."""

    from sfpo_megatron.mcore.reference_policy import ReferencePolicy

    policy = bench.policy(
        dtype=dtype, ddp=OVERLAP if overlap else None, objective=ObjectiveConfig(kl=KL)
    )
    reference = ReferencePolicy(policy)
    assert reference.num_bytes == sum(
        p.nbytes for chunk in policy.chunks for p in chunk.parameters()
    )
    minibatches = bench.prepared(policy)
    reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
    first = ref_logprobs(minibatches)
    old = [m.old_logprobs for part in minibatches for m in part.microbatches]
    assert len(first) == (len(old) if policy.layout.is_last_stage else 0)
    assert all_same_bits(first, [o for o in old if o is not None])

    one_step(bench, policy, minibatches)
    if bench.layout.data > 1 and dtype == "bfloat16":
        assert stale(policy) > 0, "no gather is due: the case does not bite"
    policy.shards.params_ready()
    before = state_of(policy)
    with counted_gathers() as gathers, reference.swapped_in():
        inside = state_of(policy)
    assert not gathers
    assert not all_same_bits(inside, before), "the weights did not move"
    assert all_same_bits(state_of(policy), before)
    reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
    assert all_same_bits(ref_logprobs(minibatches), first)
    assert all_same_bits(state_of(policy), before)


@on_ranks(DP2, overlap=[False, True])
def test_training_goes_on_as_if_there_were_no_swap(bench: Workbench, overlap: bool) -> None:
    """The same weights, bit for bit, after another step; entered with the slow pass's gather due.
    bf16, where a gather of wrong bits cannot hide in shared storage."""
    from sfpo_megatron.mcore.reference_policy import ReferencePolicy

    found = []
    for swap in (False, True):
        policy = bench.policy(dtype="bfloat16", ddp=OVERLAP if overlap else None)
        reference = ReferencePolicy(policy)
        one_step(bench, policy, bench.prepared(policy, 0))
        if swap:
            reference.set_ref_logprobs(
                bench.minibatches(policy, 0), temperature=bench.temperature(policy)
            )
        one_step(bench, policy, bench.prepared(policy, 1))
        policy.shards.params_ready()
        found.append(state_of(policy))
    assert all_same_bits(*found)


@on_ranks(TP1, DP2, PP2, TP2, needs=TP1)
def test_kl_of_a_rollout_is_the_same_everywhere(bench: Workbench) -> None:
    """In batch order, on every rank, whatever the layout: k3 summed over each rollout's tokens.
    Within 1e-5 of TP1's, which is held to the log-probs themselves."""
    from sfpo_megatron.mcore.passes import compute_logprobs, set_old_logprobs
    from sfpo_megatron.mcore.reference_policy import ReferencePolicy, rollout_kl

    policy = bench.policy(objective=ObjectiveConfig(kl=KL))
    reference = ReferencePolicy(policy)
    minibatches = bench.prepared(policy)
    reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
    one_step(bench, policy, minibatches)
    minibatches = bench.minibatches(policy)
    set_old_logprobs(
        minibatches, compute_logprobs(policy, minibatches, temperature=bench.temperature(policy))
    )
    reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
    num = references.NUM_PROMPTS * references.GROUP_SIZE
    found = rollout_kl(policy, minibatches, num, KL)
    assert (found >= 0).all() and found.max() > 1e-3, "nothing to compare"
    if bench.layout != TP1:
        _, saved = bench.load("rollout_kl")
        torch.testing.assert_close(found, saved["kl"], rtol=1e-4, atol=1e-5)
        return
    bench.save("rollout_kl", None, {"kl": found})
    checked = 0
    for microbatch in (m for part in minibatches for m in part.microbatches):
        bounds = microbatch.cu_seqlens.tolist()
        for row, start, end in zip(microbatch.rollouts.tolist(), bounds, bounds[1:], strict=False):
            mask = microbatch.loss_mask[start:end]
            if mask.any():
                gap = (microbatch.ref_logprobs - microbatch.old_logprobs)[start:end][mask].double()
                wanted = (gap.exp() - 1 - gap).sum()
                torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-6)
                checked += 1
    assert checked == num
