"""SFPO on the precision-aware optimizer is SFPO on fp32 main params, bit for bit.

TransformerEngine's FusedAdam is tests/te_standin's, written to its state contract; its arithmetic
is the same with and without remainders. Not exercised here: TransformerEngine itself, FP8 states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import references
import torch
from harness import TE1, TEDP2, on_ranks
from made.bits import all_same_bits, clones, same_bits
from made.policies import FP32_MASTERS, PRECISION_AWARE, live_params, precision_aware_policy
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench


def joined(bf16: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 main param, by integer arithmetic on Python's own terms."""
    high = bf16.view(torch.int16).long() - (remainder < 0).long()
    bits = (high << 16 | (remainder.long() & 0xFFFF)) & 0xFFFFFFFF
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)


def half_up(main: Tensor) -> Tensor:
    """bf16 of fp32 as FusedAdam rounds with remainders: ties away from zero."""
    bits = (main.view(torch.int32).long() & 0xFFFFFFFF) + 0x8000 >> 16 & 0xFFFF
    return torch.where(bits < 1 << 15, bits, bits - (1 << 16)).short().view(torch.bfloat16)


def megatron_policy(bench: Workbench, *, rounds_half_up: bool, dtype: str) -> Any:
    """Main params in Megatron's fp32 shards; FusedAdam's rounding of them, where that is not half
    to even, is put into Megatron's copy to the model params (one in 2^17 elements differs)."""
    from sfpo_megatron.mcore.shards.distributed import DistributedMainParams

    policy = bench.policy(dtype=dtype)
    (member,) = policy.optimizer.chained_optimizers
    assert isinstance(policy.shards._members[0], DistributedMainParams)
    if rounds_half_up:

        def copy() -> None:
            for mains, params in zip(
                member.shard_fp32_from_float16_groups, member.shard_float16_groups, strict=True
            ):
                for main, param in zip(mains, params, strict=True):
                    param.copy_(half_up(main))

        member._copy_main_params_to_model_params = copy
    return policy


def drawn(policy: Any) -> Tensor:
    """This rank's main params, joined: how they are cut into pieces does not matter."""
    return torch.cat([tensor.detach().view(-1).clone() for tensor in policy.shards.tensors()])


def stored(policy: Any) -> Tensor:
    """The same, straight from FusedAdam's state."""
    (member,) = policy.optimizer.chained_optimizers
    found = []
    for param in (p for group in member.optimizer.param_groups for p in group["params"]):
        main = member.optimizer.state.get(param, {}).get("master_param")
        if main is None or param.dtype == torch.float32:
            main = param.float()
        elif main.dtype == torch.int16:
            main = joined(param, main)
        found.append(main.detach().view(-1).clone())
    return torch.cat(found)


def sfpo_steps(bench: Workbench, policy: Any) -> list[Tensor]:
    """Main params and gathered model params after each of three steps."""
    snapshot = SlowSnapshot(policy.shards)
    found = []
    for step in range(references.NUM_STEPS):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        results = sfpo_step(run_pass, snapshot, num_fast_passes=1, alpha=references.ALPHA)
        assert sum(result.num_skipped for result in results) == 0
        policy.shards.params_ready()
        found += [drawn(policy), *clones(live_params(policy))]
    return found


@on_ranks(
    *(TE1, TEDP2),
    mode=["remainders", "fp32_masters", "fp32_params"],
    only=["TE1-remainders"],
)
def test_three_sfpo_steps_equal_megatrons_fp32_main_params(bench: Workbench, mode: str) -> None:
    dtype = "float32" if mode == "fp32_params" else "bfloat16"
    policy = precision_aware_policy(
        bench, FP32_MASTERS if mode == "fp32_masters" else PRECISION_AWARE, dtype
    )
    found = sfpo_steps(bench, policy)
    assert same_bits(drawn(policy), stored(policy))
    (member,) = policy.optimizer.chained_optimizers
    kinds = {state["master_param"].dtype for state in member.optimizer.state.values()}
    assert kinds == {torch.int16 if mode == "remainders" else torch.float32}
    reference = megatron_policy(bench, rounds_half_up=mode == "remainders", dtype=dtype)
    assert all_same_bits(found, sfpo_steps(bench, reference))


@on_ranks(
    *(TE1, TEDP2),
    mode=["remainders", "fp32_masters"],
    only=["TE1-remainders", "TE1-fp32_masters"],
)
def test_a_null_step_after_a_reposition_changes_nothing(bench: Workbench, mode: str) -> None:
    """And the main params after the reposition are torch.lerp, the model params their rounding."""
    policy = precision_aware_policy(
        bench, FP32_MASTERS if mode == "fp32_masters" else PRECISION_AWARE, "bfloat16"
    )
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    slow = stored(policy)
    run_pass()
    fast = stored(policy)
    snapshot.reposition(references.ALPHA)
    policy.shards.params_ready()
    masters, params = stored(policy), clones(live_params(policy))
    assert same_bits(masters, torch.lerp(slow, fast, references.ALPHA))
    assert not same_bits(masters, fast)
    (member,) = policy.optimizer.chained_optimizers
    shards = torch.cat([p for group in member.optimizer.param_groups for p in group["params"]])
    rounded = half_up(masters) if mode == "remainders" else masters.bfloat16()
    assert same_bits(shards, rounded)
    for group in policy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    assert run_pass().num_skipped == 0
    policy.shards.params_ready()
    assert same_bits(masters, stored(policy)), "main params moved"
    assert all_same_bits(params, live_params(policy)), "model params moved"


@on_ranks(TE1)
def test_drawing_writes_nothing_and_edits_write_their_piece(bench: Workbench) -> None:
    """Before the first step too, when there is no state: reading makes none, an edit does."""
    from sfpo_megatron.mcore.shards import precision_aware

    policy = precision_aware_policy(bench, PRECISION_AWARE, "bfloat16")
    (member,) = policy.optimizer.chained_optimizers
    written: list[int] = []
    original = precision_aware.split

    def counting(main: Tensor, *to: Tensor) -> None:
        written.append(main.numel())
        original(main, *to)

    precision_aware.split = counting
    try:
        before = drawn(policy)
        sizes = [tensor.numel() for tensor in policy.shards.tensors()]
        assert written == [] and not member.optimizer.state
        assert max(sizes) == 1000 and 0 < min(sizes) < 1000
        for index, tensor in enumerate(policy.shards.tensors()):
            if index == 1:
                tensor.mul_(1 + 2**-12)  # not a bf16 number
        assert written == [sizes[1]]
        after = drawn(policy)
        start, end = sizes[0], sizes[0] + sizes[1]
        assert torch.equal(after[start:end], before[start:end] * (1 + 2**-12))
        assert torch.equal(after[:start], before[:start]) and torch.equal(after[end:], before[end:])
        assert len(member.optimizer.state) == 1
        assert policy.shards.step_counts() == [0.0] * len(member.optimizer.param_groups)
        bench.one_pass(policy, bench.prepared(policy))()
        assert written == [sizes[1]], "a pass drew main params"
        assert [t.numel() for t in policy.shards.tensors()] == sizes
        for tensor in policy.shards.tensors():  # the consumer stops at the one it edited
            tensor.zero_()
            break
        assert written == [sizes[1], sizes[0]] and drawn(policy)[: sizes[0]].eq(0).all()
    finally:
        precision_aware.split = original


def bit_patterns() -> Iterator[tuple[str, Tensor]]:
    """fp32 [n]: what rounding and sign extension could get wrong."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=random)
    yield "normal", normal * 0.02
    high = torch.randint(-(1 << 15), 1 << 15, (100_000,), generator=random, dtype=torch.int32)
    yield "ties", (high << 16 | 0x8000).view(torch.float32)
    yield (
        "any bits",
        (high << 16 | torch.arange(100_000, dtype=torch.int32) & 0xFFFF).view(torch.float32),
    )
    yield "denormals", normal * 1e-40
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4028235e38, -3.4028235e38]
    yield "special", torch.tensor([*special, 1.1754944e-38, 1e-45, -1e-45])


@on_ranks(TE1)
def test_codec(bench: Workbench) -> None:
    """split then join is the identity on bits; the bf16 is rounded half up, not half to even."""
    from sfpo_megatron.mcore.shards.precision_aware import join, split

    for name, main in bit_patterns():
        bf16 = torch.empty(main.numel(), dtype=torch.bfloat16)
        remainder = torch.empty(main.numel(), dtype=torch.int16)
        split(main, bf16, remainder)
        again = torch.empty_like(main)
        join(bf16, remainder, again)
        assert same_bits(again, main), name
        assert same_bits(joined(bf16, remainder), main), name
        assert same_bits(bf16, half_up(main)), name
    ties = dict(bit_patterns())["ties"]
    even = ties.bfloat16()
    split(ties, even.clone(), remainder := torch.empty(ties.numel(), dtype=torch.int16))
    wrong = joined(even, remainder)
    finite = ties.isfinite() & wrong.isfinite() & (ties != 0)
    error = ((wrong - ties) / ties)[finite].abs().max()
    assert error > 0.005, "`.to(bfloat16)` would do: split has become unnecessary"


@on_ranks(TE1, name=["exp_avg_dtype", "exp_avg_sq_dtype"], only=["TE1-exp_avg_dtype"])
def test_moments_of_low_precision(bench: Workbench, name: str) -> None:
    """Fine for the weights; `sfpo.moments` other than keep is refused when the snapshot is made."""
    from sfpo_megatron.snapshots.moments import MomentSnapshot

    policy = precision_aware_policy(bench, PRECISION_AWARE | {name: "float16"}, "bfloat16")
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    run_pass()
    slow, snapshot = drawn(policy), SlowSnapshot(policy.shards)
    sfpo_step(run_pass, snapshot, num_fast_passes=1, alpha=references.ALPHA)
    assert not same_bits(slow, drawn(policy))
    try:
        MomentSnapshot(snapshot, policy.shards, mode="restore")
    except ValueError as error:
        assert str(error).startswith(f"megatron.optimizer.{name}: found torch.float16"), error
    else:
        raise AssertionError("scaled moments were accepted")


@on_ranks(TE1)
def test_moments_are_put_back(bench: Workbench) -> None:
    """alpha=0 and `moments: restore` is one plain pass; the step count is in the param group."""
    from sfpo_megatron.snapshots.moments import MomentSnapshot

    found = []
    for num_fast_passes in (2, 0):
        policy = precision_aware_policy(bench, PRECISION_AWARE, "bfloat16")
        run_pass = bench.one_pass(policy, bench.prepared(policy))
        run_pass()
        snapshot = MomentSnapshot(SlowSnapshot(policy.shards), policy.shards, mode="restore")
        sfpo_step(run_pass, snapshot, num_fast_passes=num_fast_passes, alpha=0.0)
        assert set(policy.shards.step_counts()) == {2.0 * references.MINIBATCHES}
        found.append([stored(policy), *clones(policy.shards.moments())])
    assert all_same_bits(*found)
