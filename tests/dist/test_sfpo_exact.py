"""The exact properties of SFPO on Megatron's optimizer, bit for bit (fp32, TP1 and DP2).

With fp32 params the main shards alias the model params, so nothing here exercises `publish`'s copy:
test_bf16_shards.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
from harness import DP2, TP1, on_ranks
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

STEPS_A_PASS = references.MINIBATCHES


def state_of(policy: Any) -> list[Tensor]:
    """Clones of everything an update changes on this rank: weights, moments, step counts."""
    from workbench import adam_states, clones

    tensors = [*policy.shards.tensors()]
    for state in adam_states(policy):
        tensors += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return clones(tensors)


def passes(bench: Workbench, count: int) -> list[Tensor]:
    policy = bench.policy()
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    for _ in range(count):
        run_pass()
    return state_of(policy)


def one_step(bench: Workbench, *, num_fast_passes: int, alpha: float) -> list[Tensor]:
    policy = bench.policy()
    snapshot = SlowSnapshot(policy.shards)
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    results = sfpo_step(run_pass, snapshot, num_fast_passes=num_fast_passes, alpha=alpha)
    assert len(results) == num_fast_passes + 1
    return state_of(policy)


@on_ranks(TP1, DP2)
def test_two_runs_are_equal_and_alpha_matters(bench: Workbench) -> None:
    from workbench import all_same_bits

    first = one_step(bench, num_fast_passes=3, alpha=0.8)
    assert all_same_bits(first, one_step(bench, num_fast_passes=3, alpha=0.8))
    assert not all_same_bits(first, one_step(bench, num_fast_passes=3, alpha=0.7))


@on_ranks(TP1, DP2)
def test_alpha_one_is_k_plus_one_plain_passes(bench: Workbench) -> None:
    from workbench import all_same_bits

    assert all_same_bits(one_step(bench, num_fast_passes=3, alpha=1.0), passes(bench, 4))


@on_ranks(TP1, DP2)
def test_k_zero_is_the_plain_update(bench: Workbench) -> None:
    from workbench import all_same_bits

    assert all_same_bits(one_step(bench, num_fast_passes=0, alpha=0.8), passes(bench, 1))


@on_ranks(TP1, DP2)
def test_alpha_zero_goes_back_and_moments_carry_through(bench: Workbench) -> None:
    """Looks at the optimizer from inside `run_pass`, where the slow correction begins."""
    from workbench import adam_states, all_same_bits, clones

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
