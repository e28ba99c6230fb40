"""DistributedOptimizer: fp32 shards of bf16 params, or views of fp32 params; gathers over DP.

Private names of Megatron-Core used here (tests/dist/test_private_names.py holds them):
`shard_fp32_from_float16_groups`, `shard_fp32_groups`, `model_chunks`,
`bucket_groups`, `expert_parallel_bucket_groups`, `param_gather_handle`, `param_gather_dispatched`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def main_params(optimizer: DistributedOptimizer) -> list[Tensor]:
    """This rank's fp32 shards, flat. For fp32 params they alias the model params' storage."""
    groups = [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups]
    return [shard for group in groups for shard in group]


def _bucket_groups(optimizers: Sequence[DistributedOptimizer]) -> Iterator[Any]:
    seen: list[Any] = []
    for optimizer in optimizers:
        for chunk in optimizer.model_chunks:
            if not any(chunk is other for other in seen):  # dense and expert parts share chunks
                seen.append(chunk)
    for chunk in seen:
        yield from chunk.bucket_groups
        yield from chunk.expert_parallel_bucket_groups


def drain(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Wait for outstanding gathers. `start_param_sync(force_sync=True)` would return after such a
    wait WITHOUT gathering (param_and_grad_buffer.py), leaving params from before the edit."""
    for group in _bucket_groups(optimizers):
        if group.param_gather_handle is not None:
            group.param_gather_handle.wait()
            group.param_gather_handle = None


def gather(optimizers: Sequence[DistributedOptimizer]) -> None:
    """All-gather every bucket now and leave nothing outstanding."""
    for group in _bucket_groups(optimizers):
        assert group.param_gather_handle is None, "drain() first"
        group.start_param_sync(force_sync=True)
        assert group.param_gather_handle is None


def gather_if_due(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Gather what the lazy gather of `overlap_param_gather` has not done since the last step."""
    drain(optimizers)
    for group in _bucket_groups(optimizers):
        if group.ddp_config.overlap_param_gather and not group.param_gather_dispatched:
            group.start_param_sync(force_sync=True)
