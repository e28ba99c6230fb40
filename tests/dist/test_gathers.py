"""SFPO makes exactly as many param all-gathers as the same optimizer steps make without it.

(K + 1) x minibatches rounds, with Megatron's overlap_param_gather and without: the last fast step
does not gather what the reposition is about to overwrite. Collectives are counted where Megatron
issues them. Not exercised here: NCCL, expert-parallel buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, PP2DP2, VPP2, on_ranks
from made.bits import all_same_bits, clones, same_bits
from made.policies import OVERLAP, gathered_main_params, stale
from repositions import counted_gathers

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

NUM_STEPS = (references.K + 1) * references.MINIBATCHES


def policy_with_state(bench: Workbench, overlap: bool) -> tuple[Any, Any]:
    """A policy whose params are gathered, and its minibatches."""
    policy = bench.policy(dtype="bfloat16", ddp=OVERLAP if overlap else None)
    minibatches = bench.prepared(policy)
    policy.shards.params_ready()
    return policy, minibatches


def plain_megatron_steps(bench: Workbench, policy: Any, minibatches: Any, count: int) -> None:
    """zero_grad, forward-backward, optimizer.step(): Megatron's loop, which gathers as it likes."""
    from sfpo_megatron.mcore import passes
    from sfpo_megatron.objectives.objective import PolicyObjective

    objective = PolicyObjective.of(bench.config_of(policy))
    for index in range(count):
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
        policy.optimizer.zero_grad()
        passes._forward_backward(policy, minibatches[index % len(minibatches)], objective)
        assert policy.optimizer.step()[0]


@on_ranks(DP2, PP2DP2, VPP2, overlap=[False, True], full=["PP2xDP2-False", "PP2xVPP2-False"])
def test_as_many_gathers_as_the_same_steps_without_sfpo(bench: Workbench, overlap: bool) -> None:
    policy, minibatches = policy_with_state(bench, overlap)
    with counted_gathers() as plain:
        plain_megatron_steps(bench, policy, minibatches, NUM_STEPS)
        policy.shards.params_ready()  # with overlap, the last step's gather is still due
    policy, minibatches = policy_with_state(bench, overlap)
    with counted_gathers() as ours:
        sfpo_step(
            bench.one_pass(policy, minibatches),
            SlowSnapshot(policy.shards),
            num_fast_passes=references.K,
            alpha=references.ALPHA,
        )
        policy.shards.params_ready()
        policy.shards.params_ready()  # nothing is due a second time
    buckets = sum(len(group.buckets) for chunk in policy.chunks for group in chunk.bucket_groups)
    assert len(plain) == NUM_STEPS * buckets, "the count of plain steps is not what we think"
    assert sorted(ours) == sorted(plain), f"{len(ours)} gathers with SFPO, {len(plain)} without"


@on_ranks(DP2, overlap=[False, True])
def test_when_gathers_run_does_not_change_the_weights(bench: Workbench, overlap: bool) -> None:
    """Eager `publish` (the default, for other people's loops) and ours: same bits. The last fast
    step leaves params stale in ours, or the test would not bite."""
    from sfpo_megatron.mcore.shards import MainParamShards

    found = []
    for defer in (False, True):
        policy, minibatches = policy_with_state(bench, overlap)
        run_pass = bench.one_pass(policy, minibatches)
        snapshot = SlowSnapshot(policy.shards)
        if not defer:
            eager = MainParamShards(policy.optimizer)
            snapshot = SlowSnapshot(eager)
        sfpo_step(run_pass, snapshot, num_fast_passes=1, alpha=references.ALPHA)
        assert stale(policy) > 0, "optimizer.step() gathered"
        policy.shards.params_ready()
        assert stale(policy) == 0
        found.append(clones([p for chunk in policy.chunks for p in chunk.parameters()]))
    assert all_same_bits(*found)


@on_ranks(DP2, overlap=[False, True])
def test_what_is_sent_to_engines_is_the_shards_joined(bench: Workbench, overlap: bool) -> None:
    """After the slow pass, refit and export read (through `MegatronWeightSource`) bf16 of the
    ranks' main shards joined, bit for bit."""
    from sfpo_megatron.families.operations import split
    from sfpo_megatron.families.table import rules_of
    from sfpo_megatron.mcore.model import named_params
    from sfpo_megatron.resharding.source import MegatronWeightSource

    policy, minibatches = policy_with_state(bench, overlap)
    sfpo_step(
        bench.one_pass(policy, minibatches),
        SlowSnapshot(policy.shards),
        num_fast_passes=references.K,
        alpha=references.ALPHA,
    )
    sent = {name: tensor.clone() for name, tensor in MegatronWeightSource(policy)}
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    mains = [main for _, main in gathered_main_params(policy)]
    main_of = {id(param): main for param, main in zip(params, mains, strict=True)}
    whole = {name: main_of[id(param)] for name, param in named_params(policy.chunks)}
    compared = 0
    for rule in rules_of(policy.shape) if bench.rank == 0 else ():
        parts = split(rule, whole[rule.megatron].to(torch.bfloat16), policy.shape)
        for name, part in zip(rule.hf, parts, strict=True):
            assert same_bits(sent[name], part), f"{name}: what is sent is not the joined shards"
            compared += 1
    assert compared == (len(sent) if bench.rank == 0 else 0)
