"""Megatron's process groups, for code outside `mcore` that moves weights."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


def tensor_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the other shards of this rank's tensors."""
    return parallel_state.get_tensor_model_parallel_group()


def stage_leaders() -> list[int]:
    """Global ranks of this rank's pipeline, by stage; on rank 0's own pipeline they are the ranks
    with tensor and data rank 0."""
    return dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
