"""PrePO's reposition on each of Megatron's optimizers: the rule in float64, and its ends.

Whole runs against the plain trainer, on every layout: test_exactness.py. Not exercised: a skipped
optimizer step on Megatron (tests/unit/test_snapshots_predicted.py has it on plain tensors).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import references
import torch
import torch.distributed as dist
from comparisons import predicting
from harness import DP2, EP2, TE1, TEDP2, TP1, TP2, on_ranks
from made.bits import all_same_bits, clones
from made.policies import FP32_MASTERS, PRECISION_AWARE, offloaded_policy, precision_aware_policy
from made.prepo import predicted

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots.moments import MomentSnapshot
from sfpo_megatron.snapshots.predicted import Scales

if TYPE_CHECKING:
    from workbench import Workbench

UNSHARDED = {"use_distributed_optimizer": False}
KINDS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda bench: bench.policy(),
    "bfloat16": lambda bench: bench.policy(dtype="bfloat16"),
    "unsharded": lambda bench: bench.policy(ddp=UNSHARDED),
    "unsharded16": lambda bench: bench.policy(dtype="bfloat16", ddp=UNSHARDED),
    "sgd": lambda bench: bench.policy(ddp=UNSHARDED, optimizer={"optimizer": "sgd"}, lr=0.01),
    "offloaded": lambda bench: offloaded_policy(bench, 0.5),
}
ON_TE: dict[str, Callable[[Any], Any]] = {
    "remainders": lambda bench: precision_aware_policy(bench, PRECISION_AWARE, "bfloat16"),
    "masters": lambda bench: precision_aware_policy(bench, FP32_MASTERS, "bfloat16"),
}
HORIZON = 5


def check_rule(bench: Workbench, policy: Any) -> None:
    """In two train steps, theta_a of every shard is the float64 rule's of theta_0, 1 and 2."""
    snapshot = predicting(policy, HORIZON)
    for step in range(2):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        seen = [clones(policy.shards.tensors())]

        def watched(seen: list[Any] = seen, run_pass: Any = run_pass) -> Any:
            seen.append(clones(policy.shards.tensors()))
            result = run_pass()
            seen.append(clones(policy.shards.tensors()))
            assert result.num_skipped == 0
            return result

        sfpo_step(watched, snapshot, num_fast_passes=2, alpha=references.ALPHA)
        _, start, first, _, second, found, _ = seen
        decays = [(1 - each) ** references.MINIBATCHES for each in policy.shards.decays()]
        shares = zip(start, first, decays, strict=True)
        rms = of_whole_weights(policy, [d * a.double() - b.double() for a, b, d in shares])
        farthest = 0.0
        for *weights, got, decay, each in zip(
            start, first, second, found, decays, rms, strict=True
        ):
            wanted = predicted(
                weights, decay=decay, horizon=HORIZON, alpha=references.ALPHA, rms=each
            )
            if not got.numel():
                continue
            rounding = 2e-7 * got.abs().max().item()
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-9 + rounding)
            plain = torch.lerp(weights[0], weights[2], references.ALPHA)
            farthest = max(farthest, (got - plain).abs().max().item())
        assert farthest > references.LR, "nothing was predicted"


def of_whole_weights(policy: Any, moved: list[Any]) -> list[float]:
    """Root mean squares over the weights that these parts are of, put together over all ranks."""
    from sfpo_megatron.mcore.model import named_params

    names = {id(param): name for name, param in named_params(policy.chunks)}
    mine = [names[id(param)] for param, _ in policy.shards.owners()]
    everyone: list[Any] = [None] * dist.get_world_size()
    parts = [(n, d.square().sum().item(), d.numel()) for n, d in zip(mine, moved, strict=True)]
    dist.all_gather_object(everyone, parts)
    found = {name: [0.0, 0] for name in mine}
    for name, square, numel in (part for of_rank in everyone for part in of_rank):
        if name in found:
            found[name][0] += square
            found[name][1] += numel
    return [(found[name][0] / found[name][1]) ** 0.5 for name in mine]


def check_two_passes(bench: Workbench, make_policy: Callable[[Any], Any]) -> None:
    """K = 2 is SFPO with its moments put back, bit for bit, after two train steps."""
    found = []
    for predicts in (True, False):
        policy = make_policy(bench)
        snapshot: Any = predicting(policy, 2)
        if not predicts:
            snapshot = MomentSnapshot(SlowSnapshot(policy.shards), policy.shards, mode="restore")
        for step in range(2):
            run_pass = bench.one_pass(policy, bench.prepared(policy, step))
            sfpo_step(run_pass, snapshot, num_fast_passes=2, alpha=references.ALPHA)
        policy.shards.params_ready()
        live = [p for chunk in policy.chunks for p in chunk.parameters()]
        found.append(clones([*policy.shards.tensors(), *policy.shards.moments(), *live]))
    assert all_same_bits(*found)


@on_ranks(
    *(TP1, DP2, TP2),
    kind=list(KINDS),
    only=["DP2-bfloat16", "TP2-unsharded16", "DP2-sgd", "DP2-offloaded"],
)
def test_the_rule_on_every_optimizer(bench: Workbench, kind: str) -> None:
    check_rule(bench, KINDS[kind](bench))


@on_ranks(EP2, dtype=["float32", "bfloat16"], only=["DP2xEP2-bfloat16"])
def test_the_rule_on_two_optimizers(bench: Workbench, dtype: str) -> None:
    """Experts have their own, which steps after the other."""
    policy = bench.policy(references.TRAINED_MOE, dtype=dtype)
    assert len(policy.optimizer.chained_optimizers) == 2
    check_rule(bench, policy)


@on_ranks(TE1, TEDP2, kind=list(ON_TE), only=["TE1-remainders"])
def test_the_rule_on_precision_aware_optimizers(bench: Workbench, kind: str) -> None:
    check_rule(bench, ON_TE[kind](bench))


@on_ranks(TP1, DP2, kind=list(KINDS), only=["DP2-float32"])
def test_two_passes_are_sfpo(bench: Workbench, kind: str) -> None:
    check_two_passes(bench, KINDS[kind])


@on_ranks(TE1, kind=list(ON_TE), only=[])
def test_two_passes_are_sfpo_on_precision_aware_optimizers(bench: Workbench, kind: str) -> None:
    check_two_passes(bench, ON_TE[kind])


@on_ranks(DP2)
def test_the_config_says_how_it_is_repositioned(bench: Workbench) -> None:
    """The learner's snapshot, two real passes, and the bytes that the planner counts."""
    from dataclasses import replace

    from sfpo_megatron.mcore.control import ControlGroup
    from sfpo_megatron.planner.memory import rank_memory
    from sfpo_megatron.run.learner import fast_passes
    from sfpo_megatron.run.slow_snapshot import slow_snapshot
    from sfpo_megatron.sfpo import FlatCopy

    policy = bench.policy()
    config = bench.config_of(policy)
    sfpo = replace(config.sfpo, trajectory="predicted", num_fast_passes=10, moments="restore")
    config = replace(config, sfpo=sfpo)
    snapshot = slow_snapshot(config, policy, Scales())
    from sfpo_megatron.gate import EntropyGate

    count = fast_passes(config, ControlGroup(60.0), EntropyGate.of(sfpo), 1)
    assert count == 2
    bench.one_pass(policy, bench.prepared(policy))()  # from here on there are moments
    snapshot.take()
    held = sum(buffer.nbytes for buffer in snapshot.buffers())
    assert held == 4 * FlatCopy(policy.shards.tensors()).num_bytes
    assert rank_memory(policy.shape, config, spec="local").snapshot == held
