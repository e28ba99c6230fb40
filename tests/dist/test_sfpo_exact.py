"""The exact properties of SFPO on Megatron's optimizer, bit for bit (fp32, TP1 and DP2).

With fp32 params the main shards alias the model params, so nothing here exercises `publish`'s copy:
test_bf16_shards.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import references
import torch
from harness import DP2, PP2, TE1, TP1, on_ranks
from made.bits import all_same_bits, clones
from made.policies import adam_states
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots.moments import MomentSnapshot

if TYPE_CHECKING:
    from workbench import Workbench

STEPS_A_PASS = references.MINIBATCHES


def state_of(policy: Any) -> list[Tensor]:
    """Clones of everything an update changes on this rank: weights, moments, step counts (torch's
    Adam keeps them a param, TransformerEngine's a group)."""
    tensors = [*policy.shards.tensors()]
    for state in adam_states(policy):
        tensors += [state[key] for key in ("exp_avg", "exp_avg_sq", "step") if key in state]
    steps = [group["step"] for group in policy.optimizer.param_groups if "step" in group]
    return [*clones(tensors), torch.tensor(steps)]


def passes(bench: Workbench, count: int) -> list[Tensor]:
    policy = bench.policy()
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    for _ in range(count):
        run_pass()
    return state_of(policy)


def one_step(
    bench: Workbench,
    *,
    num_fast_passes: int,
    alpha: float,
    moments: Any = "keep",
    passes_before: int = 0,
) -> list[Tensor]:
    policy = bench.policy()
    snapshot: Any = SlowSnapshot(policy.shards)
    if moments != "keep":
        snapshot = MomentSnapshot(snapshot, policy.shards, mode=moments)
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    for _ in range(passes_before):
        run_pass()
    results = sfpo_step(run_pass, snapshot, num_fast_passes=num_fast_passes, alpha=alpha)
    assert len(results) == num_fast_passes + 1
    return state_of(policy)


@on_ranks(TP1, DP2)
def test_two_runs_are_equal_and_alpha_matters(bench: Workbench) -> None:
    first = one_step(bench, num_fast_passes=3, alpha=0.8)
    assert all_same_bits(first, one_step(bench, num_fast_passes=3, alpha=0.8))
    assert not all_same_bits(first, one_step(bench, num_fast_passes=3, alpha=0.7))


@on_ranks(TP1, DP2)
def test_alpha_one_is_k_plus_one_plain_passes(bench: Workbench) -> None:
    assert all_same_bits(one_step(bench, num_fast_passes=3, alpha=1.0), passes(bench, 4))


@on_ranks(TP1, DP2)
def test_k_zero_is_the_plain_update(bench: Workbench) -> None:
    assert all_same_bits(one_step(bench, num_fast_passes=0, alpha=0.8), passes(bench, 1))


@on_ranks(TP1, DP2)
def test_alpha_zero_goes_back_and_moments_carry_through(bench: Workbench) -> None:
    """Looks at the optimizer from inside `run_pass`, where the slow correction begins."""
    policy = bench.policy()
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    weights: list[list[Tensor]] = []
    before: list[list[Tensor]] = []
    after: list[list[Tensor]] = []

    def moments() -> list[Tensor]:
        return clones(
            s[key] for s in adam_states(policy) for key in ("exp_avg", "exp_avg_sq", "step")
        )

    def watched() -> Any:
        weights.append(clones(policy.shards.tensors()))
        before.append(moments())
        result = run_pass()
        after.append(moments())
        return result

    sfpo_step(watched, SlowSnapshot(policy.shards), num_fast_passes=3, alpha=0.0)
    assert len(weights) == 4 and len(weights[0]) == len(list(policy.shards.tensors())) > 0
    assert all_same_bits(weights[3], weights[0]), "the slow correction did not start at theta_0"
    assert not all_same_bits(weights[2], weights[0])
    assert all_same_bits(before[3], after[2]), "the reposition touched Adam's moments or step"
    assert not all_same_bits(before[3], before[2])
    steps = {int(state["step"]) for state in adam_states(policy)}
    assert steps == {4 * STEPS_A_PASS}, f"Adam counted {steps} optimizer steps"


@on_ranks(TP1, DP2, TE1, passes_before=[0, 1], full=["TP1-0", "TP1-1"])
def test_alpha_zero_with_restored_moments_is_one_plain_pass(
    bench: Workbench, passes_before: int
) -> None:
    """Before the optimizer has any state, and after it has."""
    restored = one_step(
        bench, num_fast_passes=2, alpha=0.0, moments="restore", passes_before=passes_before
    )
    assert all_same_bits(restored, passes(bench, passes_before + 1))
    kept = one_step(bench, num_fast_passes=2, alpha=0.0, passes_before=passes_before)
    assert not all_same_bits(restored, kept)


@on_ranks(TP1, DP2, TE1, full=["TP1"])
def test_reset_moments_are_zero_where_the_slow_correction_begins(bench: Workbench) -> None:
    policy = bench.policy()
    snapshot = MomentSnapshot(SlowSnapshot(policy.shards), policy.shards, mode="reset")
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    seen: list[tuple[float, float]] = []

    def watched() -> Any:
        moments, steps = policy.shards.moments(), policy.shards.step_counts()
        seen.append((sum(m.abs().sum().item() for m in moments), max(steps, default=0)))
        return run_pass()

    for _ in range(2):
        sfpo_step(watched, snapshot, num_fast_passes=2, alpha=0.8)
    (_, (first, first_steps), zero, second, _, zero_again) = seen
    assert zero == zero_again == (0, 0)
    assert first > 0 and first_steps == STEPS_A_PASS
    assert second[1] == STEPS_A_PASS, "the second step did not go on from the slow correction's"


@on_ranks(TP1, PP2, count=[1, 2], only=["TP1-1", "PP2-2"])
def test_the_first_pass_yields_the_old_logprobs(bench: Workbench, count: int) -> None:
    """The first minibatch takes no forward of its own; the same bits (weights, log-probs)."""
    from functools import partial

    from sfpo_megatron.mcore.passes import compute_logprobs, run_pass, set_old_logprobs
    from sfpo_megatron.objectives.objective import PolicyObjective

    found = []
    for first_pass_is_old in (False, True):
        policy = bench.policy(minibatches=count)
        minibatches = bench.minibatches(policy)
        assert len(minibatches) == count and len(minibatches[0].microbatches) > 1
        computed = minibatches[1:] if first_pass_is_old else minibatches
        set_old_logprobs(computed, compute_logprobs(policy, computed, temperature=1.0))
        objective = PolicyObjective.of(bench.config_of(policy), first_pass_is_old=first_pass_is_old)
        results = sfpo_step(
            partial(run_pass, policy, minibatches, objective),
            SlowSnapshot(policy.shards),
            num_fast_passes=2,
            alpha=0.8,
        )
        assert results[0].minibatches[0].stats["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert results[1].minibatches[0].stats["ppo_kl"] != 0
        old = [m.old_logprobs for part in minibatches for m in part.microbatches]
        assert all((logprobs is not None) == policy.layout.is_last_stage for logprobs in old)
        found.append([*state_of(policy), *(o for o in old if o is not None)])
    assert all_same_bits(*found)


@on_ranks(DP2)
def test_the_gate_of_rank_0_decides_for_all(bench: Workbench) -> None:
    from sfpo_megatron.gate import EntropyGate
    from sfpo_megatron.mcore.control import ControlGroup
    from sfpo_megatron.run.learner import fast_passes

    config, control = bench.config("qwen2_tied"), ControlGroup(60.0)
    for closed_on in (0, 1):
        gate = EntropyGate(stop_step=0 if bench.rank == closed_on else None)
        assert gate.is_open(1) == (bench.rank != closed_on)
        expected = 0 if closed_on == 0 else config.sfpo.num_fast_passes
        assert fast_passes(config, control, gate, 1) == expected
