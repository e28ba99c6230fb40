"""The trainer's memory to the host and back in place: nobody that trains afterwards can tell.

Not exercised here: CUDA (page-locked memory, copies beside the host, the allocator's cache); on CPU
the storages are really emptied and refilled, from memory to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import references
import torch
from harness import DP2, EP2, PP2DP2, TP2, VPP2, on_ranks
from made.bits import all_same_bits, clones
from made.policies import OVERLAP, adam_states
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots.host import HostSnapshot
from sfpo_megatron.snapshots.moments import MomentSnapshot

if TYPE_CHECKING:
    from workbench import Workbench


def state_of(policy: Any) -> list[Tensor]:
    """Model params, main params, Adam's state, copied."""
    policy.shards.params_ready()
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    states = [v for s in adam_states(policy) for v in s.values() if isinstance(v, Tensor)]
    assert len(states) >= 3 * len(list(policy.shards.tensors())) > 0
    return clones([*params, *policy.shards.tensors(), *states])


def device_bytes(policy: Any, snapshot: Any) -> int:
    """Bytes of everything that is to leave the device, each storage once."""
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    tensors = [*params, *(p.main_grad for p in params), *snapshot.buffers()]
    for member in policy.optimizer.chained_optimizers:
        tensors += [p for group in member.optimizer.param_groups for p in group["params"]]
    tensors += [s[key] for s in adam_states(policy) for key in ("exp_avg", "exp_avg_sq")]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def there_and_back(policy: Any, offload: Any, snapshot: Any) -> None:
    """With nothing left behind, the same addresses or others, and clear words in between."""
    before = device_bytes(policy, snapshot)
    scratch = sum(buffer.nbytes for buffer in snapshot.buffers())
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    grads = {p.main_grad.untyped_storage()._cdata: p.main_grad for p in params}
    grad_bytes = sum(g.untyped_storage().nbytes() for g in grads.values())
    offload.make_room()  # for a refit, which reads the params
    assert not offload.is_offloaded
    assert device_bytes(policy, snapshot) == before - scratch - grad_bytes
    policy.shards.params_ready()
    offload.offload()
    assert offload.is_offloaded and device_bytes(policy, snapshot) == 0
    kept = before - scratch - grad_bytes
    assert kept <= offload.host_bytes < kept + 64 * 1000, "what is copied is not what is needed"
    for use in (
        policy.shards.params_ready,
        policy.shards.ready_for_training,
        policy.shards.publish,
        lambda: list(policy.shards.tensors()),
    ):
        with pytest.raises(RuntimeError, match="weights are in host memory"):
            use()
    offload.onload()
    assert not offload.is_offloaded and device_bytes(policy, snapshot) == before
    for grad in grads.values():  # what is dropped holds anything
        grad.untyped_storage().fill_(0x7F)
    for buffer in snapshot.buffers():
        buffer.fill_(torch.nan)


def trained(bench: Workbench, make: Callable[[Any], Any], *, away: bool, **policy_of: Any) -> Any:
    """After two SFPO steps, with a gather still due at each end; `away`: offloaded before, between
    and after them."""
    from sfpo_megatron.mcore.offload import Offload
    from sfpo_megatron.mcore.passes import compute_logprobs

    policy = bench.policy(**policy_of)
    snapshot = make(policy)
    offload = Offload(policy, snapshot.buffers)
    for step in range(2):
        if away:
            there_and_back(policy, offload, snapshot)
        minibatches = bench.prepared(policy, step)
        results = sfpo_step(
            bench.one_pass(policy, minibatches),
            snapshot,
            num_fast_passes=references.K,
            alpha=references.ALPHA,
        )
        assert sum(result.num_skipped for result in results) == 0
    if away:
        offload.offload()
        with pytest.raises(RuntimeError, match="bring them back first"):
            bench.one_pass(policy, minibatches)()
        with pytest.raises(RuntimeError, match="bring them back first"):
            compute_logprobs(policy, minibatches, temperature=bench.temperature(policy))
        offload.onload()
    return state_of(policy)


def same_with_and_without(bench: Workbench, make: Callable[[Any], Any], **policy: Any) -> None:
    plain = trained(bench, make, away=False, **policy)
    assert all_same_bits(plain, trained(bench, make, away=True, **policy))


def slow(policy: Any) -> Any:
    return SlowSnapshot(policy.shards)


@on_ranks(
    *(DP2, TP2, VPP2, PP2DP2),
    only=["DP2-bfloat16-True", "DP2-float32-False", "TP2-bfloat16-False"],
    dtype=["float32", "bfloat16"],
    overlap=[False, True],
)
def test_training_goes_on_as_if_nothing_had_left(
    bench: Workbench, dtype: str, overlap: bool
) -> None:
    """fp32 main shards share the params' storage; with bf16 and a gather due, it runs first."""
    same_with_and_without(bench, slow, dtype=dtype, ddp=OVERLAP if overlap else None)


@on_ranks(EP2)
def test_experts(bench: Workbench) -> None:
    """A ChainedOptimizer of two, and two sets of buffers."""
    same_with_and_without(bench, slow, model=references.TRAINED_MOE, dtype="bfloat16")


@on_ranks(DP2)
def test_without_the_distributed_optimizer(bench: Workbench) -> None:
    """Params have storages of their own, and every rank holds all main params."""
    ddp = {"use_distributed_optimizer": False}
    same_with_and_without(bench, slow, dtype="bfloat16", ddp=ddp)


@on_ranks(DP2, kind=["host", "restore"])
def test_other_snapshots(bench: Workbench, kind: str) -> None:
    """Their staging buffers, and the moments' copy, are dropped too."""

    def make(policy: Any) -> Any:
        if kind == "host":
            return HostSnapshot(policy.shards, bucket_bytes=1000)
        return MomentSnapshot(SlowSnapshot(policy.shards), policy.shards, mode="restore")

    same_with_and_without(bench, make, dtype="bfloat16")


@on_ranks(DP2)
def test_the_reference_policy_is_none_the_wiser(bench: Workbench) -> None:
    """Its host copy goes in and out of params that have been away."""
    from sfpo_megatron.mcore.offload import Offload
    from sfpo_megatron.mcore.reference_policy import ReferencePolicy

    policy = bench.policy(dtype="bfloat16")
    reference, offload = ReferencePolicy(policy), Offload(policy)
    minibatches = bench.prepared(policy)
    found = []
    for _ in range(2):
        reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
        found.append([m.ref_logprobs for part in minibatches for m in part.microbatches])
        offload.offload()
        with pytest.raises(RuntimeError, match="bring them back first"):
            reference.set_ref_logprobs(minibatches, temperature=bench.temperature(policy))
        offload.onload()
    assert all_same_bits(*found)
