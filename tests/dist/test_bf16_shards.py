"""bf16 params, fp32 main shards: after each reposition every model param is bf16(theta_a) exactly.

Main shards are gathered independently of Megatron (workbench.gathered_main_params). Not exercised
here: TransformerEngine's fused Adam, expert parallelism, CUDA streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from harness import DP2, PP2, PP2DP2, TP2, VPP2, on_ranks
from torch import Tensor

from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

OVERLAPS = [False, True]


def stale(policy: Any) -> int:
    """How many live model params are not bf16(main param). Collective over data-parallel ranks."""
    from workbench import gathered_main_params, same_bits

    pairs = gathered_main_params(policy)
    assert any(live.dtype == torch.bfloat16 for live, _ in pairs)
    return sum(not same_bits(live, main.to(live.dtype)) for live, main in pairs)


class WatchedShards:
    """Policy.shards that checks each publish: the main shards are the lerp, the params its bf16."""

    def __init__(self, policy: Any, alpha: float) -> None:
        self.policy, self.alpha = policy, alpha
        self.slow: list[Tensor] = []
        self.fast: list[Tensor] = []
        self.published = 0

    def tensors(self) -> Any:
        return self.policy.shards.tensors()

    def publish(self) -> None:
        from workbench import all_same_bits

        expected = [torch.lerp(s, f, self.alpha) for s, f in zip(self.slow, self.fast, strict=True)]
        assert all_same_bits(self.tensors(), expected)
        for slow, fast, now in zip(self.slow, self.fast, self.tensors(), strict=True):
            written_out = slow.double() + self.alpha * (fast.double() - slow.double())
            torch.testing.assert_close(now.double(), written_out, rtol=3e-7, atol=1e-9)
        self.policy.shards.publish()
        self.policy.shards.params_ready()  # publish only marks the gather as due
        self.published += 1
        assert stale(self.policy) == 0, "after publish, a model param is not bf16(main)"


def sfpo_steps(bench: Workbench, policy: Any, count: int) -> WatchedShards:
    from workbench import clones

    shards = WatchedShards(policy, references.ALPHA)
    snapshot = SlowSnapshot(shards)
    for step in range(count):
        run_pass = bench.one_pass(policy, bench.prepared(policy, step))
        shards.slow = clones(shards.tensors())

        def watched(run_pass: Any = run_pass) -> Any:
            result = run_pass()
            shards.fast = clones(shards.tensors())
            return result

        results = sfpo_step(watched, snapshot, num_fast_passes=references.K, alpha=references.ALPHA)
        assert sum(result.num_skipped for result in results) == 0
    return shards


@on_ranks(TP2, DP2, PP2, VPP2, overlap=OVERLAPS, only=["TP2-False", "DP2-False", "DP2-True"])
def test_params_are_bf16_of_the_lerp_after_each_reposition(bench: Workbench, overlap: bool) -> None:
    """Three SFPO steps. With overlap, the last optimizer step of a pass leaves params ungathered
    (asserted at DP2, or the test would not bite), and params_ready() gathers them."""
    from workbench import OVERLAP

    policy = bench.policy(dtype="bfloat16", ddp=OVERLAP if overlap else None)
    shards = sfpo_steps(bench, policy, references.NUM_STEPS)
    assert shards.published == references.NUM_STEPS
    if overlap and bench.layout == DP2:
        assert stale(policy) > 0, "the lazy gather was not lazy"
    policy.shards.params_ready()
    assert stale(policy) == 0, "after params_ready, a model param is not bf16(main)"
    policy.shards.params_ready()
    assert stale(policy) == 0, "a second params_ready changed params"


@on_ranks(PP2DP2)
def test_params_are_bf16_of_the_lerp_on_four_ranks(bench: Workbench) -> None:
    """Tied embeddings on two stages, each sharded over two ranks, with overlap."""
    from workbench import OVERLAP

    policy = bench.policy(dtype="bfloat16", ddp=OVERLAP)
    sfpo_steps(bench, policy, 1)
    policy.shards.params_ready()
    assert stale(policy) == 0
    bench.hf_weights(policy)  # asserts that both stages hold the same embedding


@on_ranks(
    *(TP2, DP2),
    full=["TP2-True-bfloat16", "TP2-True-float32"],
    overlap=OVERLAPS,
    dtype=["bfloat16", "float32"],
)
def test_a_null_step_after_a_reposition_changes_nothing(
    bench: Workbench, overlap: bool, dtype: str
) -> None:
    from workbench import OVERLAP

    check_null_step(bench, bench.policy(dtype=dtype, ddp=OVERLAP if overlap else None))


def check_null_step(bench: Workbench, policy: Any) -> None:
    """lr = 0 and weight_decay = 0: masters and gathered params stay at theta_a bit for bit. Any
    copy of the weights that the reposition did not reach would come back here."""
    from workbench import all_same_bits, clones

    run_pass = bench.one_pass(policy, bench.prepared(policy))
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    run_pass()
    theta_k = clones(policy.shards.tensors())
    snapshot.reposition(references.ALPHA)
    policy.shards.params_ready()
    masters = clones(policy.shards.tensors())
    assert not all_same_bits(masters, theta_k)
    live = [p for chunk in policy.chunks for p in chunk.parameters()]
    params = clones(live)
    for group in policy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    assert run_pass().num_skipped == 0
    policy.shards.params_ready()
    assert all_same_bits(masters, policy.shards.tensors()), "main params moved"
    assert all_same_bits(params, live), "model params moved"


@on_ranks(DP2)
def test_publish_drains_outstanding_gathers(bench: Workbench) -> None:
    """Upstream's start_param_sync(force_sync=True) waits for an outstanding gather and returns
    WITHOUT gathering. Shown here first, so that the test cannot pass for another reason."""
    from workbench import OVERLAP

    policy = bench.policy(dtype="bfloat16", ddp=OVERLAP)
    groups = [g for c in policy.chunks for g in c.bucket_groups]

    def edit() -> None:
        """Leave a finished gather outstanding, then change the main params under it."""
        for group in groups:
            group.start_param_sync()
            assert group.param_gather_handle is not None
            group.param_gather_handle.wait()
        with torch.no_grad():
            for shard in policy.shards.tensors():
                shard.add_(0.125)

    edit()
    for member in policy.optimizer.chained_optimizers:  # publish without its drain
        member._copy_main_params_to_model_params()
    for group in groups:
        group.start_param_sync(force_sync=True)
    assert stale(policy) > 0, "upstream gathers now: drain() has become unnecessary"

    edit()
    policy.shards.publish()
    assert all(group.param_gather_handle is None for group in groups)
    assert stale(policy) > 0, "publish gathered: test_gathers.py counts on that it waits"
    policy.shards.params_ready()
    assert stale(policy) == 0
    assert all(group.param_gather_handle is None for group in groups)
