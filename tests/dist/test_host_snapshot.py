"""`sfpo.snapshot: host` on Megatron's optimizers: the bits that the device snapshot gives.

Not exercised here: CUDA streams (tests/unit/test_snapshots_host.py plays them, tests/gpu runs
them); on CPU every copy is done when it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import references
from harness import DP2, TE1, TEDP2, TP1, on_ranks
from made.bits import all_same_bits, clones
from made.policies import FP32_MASTERS, PRECISION_AWARE, offloaded_policy, precision_aware_policy
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots.host import HostSnapshot

if TYPE_CHECKING:
    from workbench import Workbench

DTYPES = ["float32", "bfloat16"]


def host(shards: Any) -> HostSnapshot:
    """With buckets of 1000 bytes, most shards are cut into pieces."""
    snapshot = HostSnapshot(shards, bucket_bytes=1000)
    assert snapshot.num_staging_bytes == 2000
    assert snapshot.num_bytes == SlowSnapshot(shards).num_bytes
    return snapshot


def same_as_on_the_device(bench: Workbench, make_policy: Callable[[], Any]) -> None:
    """Main params and model params are the same bits after two SFPO steps."""
    found = []
    for make_snapshot in (SlowSnapshot, host):
        policy = make_policy()
        snapshot = make_snapshot(policy.shards)
        start = clones(policy.shards.tensors())
        for step in range(2):
            run_pass = bench.one_pass(policy, bench.prepared(policy, step))
            results = sfpo_step(
                run_pass, snapshot, num_fast_passes=references.K, alpha=references.ALPHA
            )
            assert sum(result.num_skipped for result in results) == 0
        policy.shards.params_ready()
        assert not all_same_bits(start, policy.shards.tensors())
        live = [p for chunk in policy.chunks for p in chunk.parameters()]
        found.append(clones([*policy.shards.tensors(), *live]))
    assert all_same_bits(*found)


@on_ranks(
    *(TP1, DP2),
    dtype=DTYPES,
    sharded=[True, False],
    only=["TP1-float32-False", "DP2-bfloat16-True"],
)
def test_trains_to_the_same_bits(bench: Workbench, dtype: str, sharded: bool) -> None:
    ddp = {"use_distributed_optimizer": sharded}
    same_as_on_the_device(bench, lambda: bench.policy(dtype=dtype, ddp=ddp))


@on_ranks(TP1, DP2, full=["TP1"])
def test_with_main_params_on_the_host_and_the_device(bench: Workbench) -> None:
    """CPU-offloaded: half of the main params are HybridDeviceOptimizer's host copies."""
    same_as_on_the_device(bench, lambda: offloaded_policy(bench, 0.5))


@on_ranks(TE1, TEDP2, remainders=[True, False], only=["TE1-True"])
def test_with_main_params_in_a_staging_buffer(bench: Workbench, remainders: bool) -> None:
    """Precision-aware: each piece is rebuilt in the buffer that the one before it had."""
    optimizer = PRECISION_AWARE if remainders else FP32_MASTERS
    same_as_on_the_device(bench, lambda: precision_aware_policy(bench, optimizer, "bfloat16"))


@on_ranks(
    *(TP1, DP2),
    kind=[*DTYPES, "offloaded"],
    only=["TP1-float32", "DP2-bfloat16", "DP2-offloaded"],
)
def test_before_step_is_called_before_main_params_change(bench: Workbench, kind: str) -> None:
    """On every optimizer that Megatron's step() runs, once a step."""
    policy = offloaded_policy(bench, 0.5) if kind == "offloaded" else bench.policy(dtype=kind)
    minibatches = bench.prepared(policy)
    start = clones(policy.shards.tensors())
    seen: list[list[Tensor]] = []
    policy.shards.before_step(lambda: seen.append(clones(policy.shards.tensors())))
    bench.one_pass(policy, minibatches)()
    assert len(seen) == references.MINIBATCHES
    assert all_same_bits(seen[0], start)
    assert not all_same_bits(seen[1], start)
    assert not all_same_bits(seen[1], policy.shards.tensors())
