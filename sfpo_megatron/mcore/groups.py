"""Megatron's process groups, for code outside `mcore` that moves weights."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


def tensor_parallel_group(*, expert: bool) -> dist.ProcessGroup:
    """The ranks that hold the other shards of this rank's tensors, or of its experts' tensors."""
    if expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()
