"""`sfpo.snapshot: host` on Megatron's optimizers: the bits that the device snapshot gives.

Not exercised here: CUDA streams (tests/unit/test_snapshots_host.py plays them, tests/gpu runs
them); on CPU every copy is done when it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
from harness import DP2, TP1, on_ranks
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step
from sfpo_megatron.snapshots.host import HostSnapshot

if TYPE_CHECKING:
    from workbench import Workbench

DTYPES = ["float32", "bfloat16"]


def trained(bench: Workbench, dtype: str, sharded: bool, make: Any) -> list[Tensor]:
    """Main params, model params and Adam's state after two SFPO steps."""
    from workbench import adam_states, clones

    policy = bench.policy(dtype=dtype, ddp={"use_distributed_optimizer": sharded})
    snapshot = make(policy.shards)
    for step in range(2):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        sfpo_step(run_pass, snapshot, num_fast_passes=references.K, alpha=references.ALPHA)
    policy.shards.params_ready()
    state = [s[key] for s in adam_states(policy) for key in ("exp_avg", "exp_avg_sq")]
    live = [p for chunk in policy.chunks for p in chunk.parameters()]
    return clones([*policy.shards.tensors(), *live, *state])


@on_ranks(
    *(TP1, DP2),
    dtype=DTYPES,
    sharded=[True, False],
    full=["TP1-float32-True", "TP1-bfloat16-True", "TP1-bfloat16-False",
          "DP2-float32-True", "DP2-float32-False", "DP2-bfloat16-False"],
)  # fmt: skip
def test_trains_to_the_same_bits(bench: Workbench, dtype: str, sharded: bool) -> None:
    """With buckets of 1000 bytes, most shards are cut into pieces."""
    from workbench import all_same_bits

    def host(shards: Any) -> HostSnapshot:
        snapshot = HostSnapshot(shards, bucket_bytes=1000)
        assert snapshot.num_staging_bytes == 2000
        assert snapshot.num_bytes == SlowSnapshot(shards).num_bytes
        return snapshot

    ours = trained(bench, dtype, sharded, host)
    assert all_same_bits(ours, trained(bench, dtype, sharded, SlowSnapshot))


@on_ranks(TP1, DP2, dtype=DTYPES, full=["TP1-bfloat16", "DP2-float32"])
def test_before_step_is_called_before_main_params_change(bench: Workbench, dtype: str) -> None:
    """On every optimizer that Megatron's step() runs, once a step."""
    from workbench import all_same_bits, clones

    policy = bench.policy(dtype=dtype)
    minibatches = bench.prepared(policy)
    start = clones(policy.shards.tensors())
    seen: list[list[Tensor]] = []
    policy.shards.before_step(lambda: seen.append(clones(policy.shards.tensors())))
    bench.one_pass(policy, minibatches)()
    assert len(seen) == references.MINIBATCHES
    assert all_same_bits(seen[0], start)
    assert not all_same_bits(seen[1], start)
    assert not all_same_bits(seen[1], policy.shards.tensors())
