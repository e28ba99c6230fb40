"""bf16 params, fp32 main shards: after each reposition every model param is bf16(theta_a) exactly.

Main shards are gathered independently of Megatron (made/policies.py). Not exercised
here: TransformerEngine's fused Adam, expert parallelism, CUDA streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import references
import torch
from harness import DP2, PP2, PP2DP2, TP2, VPP2, on_ranks
from made.policies import OVERLAP, stale
from repositions import moved_by_a_null_step, watched_steps

if TYPE_CHECKING:
    from workbench import Workbench


@on_ranks(TP2, DP2, PP2, VPP2, overlap=[False, True], only=["TP2-False", "DP2-False", "DP2-True"])
def test_params_are_bf16_of_the_lerp_after_each_reposition(bench: Workbench, overlap: bool) -> None:
    """Three SFPO steps. With overlap, the last optimizer step of a pass leaves params ungathered
    (asserted at DP2, or the test would not bite), and params_ready() gathers them."""
    policy = bench.policy(dtype="bfloat16", ddp=OVERLAP if overlap else None)
    shards = watched_steps(bench, policy, references.NUM_STEPS)
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
    policy = bench.policy(dtype="bfloat16", ddp=OVERLAP)
    watched_steps(bench, policy, 1)
    policy.shards.params_ready()
    assert stale(policy) == 0
    bench.hf_weights(policy)  # asserts that both stages hold the same embedding


@on_ranks(
    *(TP2, DP2),
    full=["TP2-True-bfloat16", "TP2-True-float32"],
    overlap=[False, True],
    dtype=["bfloat16", "float32"],
)
def test_a_null_step_after_a_reposition_changes_nothing(
    bench: Workbench, overlap: bool, dtype: str
) -> None:
    policy = bench.policy(dtype=dtype, ddp=OVERLAP if overlap else None)
    assert not moved_by_a_null_step(bench, policy)


@on_ranks(DP2)
def test_publish_drains_outstanding_gathers(bench: Workbench) -> None:
    """Upstream's start_param_sync(force_sync=True) waits for an outstanding gather and returns
    WITHOUT gathering. Shown here first, so that the test cannot pass for another reason."""
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
