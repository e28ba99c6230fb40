"""What Megatron-LM's own loader looks for in a torch_dist checkpoint, beside the tensors.

Its training/checkpointing.py reads `args` (compared with its command line by check_checkpoint_args,
or taken over with --use-checkpoint-args), `iteration`, `checkpoint_version` and `rng_state`.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from sfpo_megatron.families.megatron_args import megatron_lm_args
from sfpo_megatron.mcore.setup import Policy


def megatron_lm_extras(policy: Policy, step: int) -> dict[str, Any]:
    """`args` and `rng_state`, as Megatron-LM's generate_state_dict and get_rng_state make them."""
    described = megatron_lm_args(policy.shape, policy.parallel, dtype=policy.dtype)
    arguments = Namespace(**vars(described), iteration=step)
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    rng_state = ShardedObject(
        "rng_state",
        [state],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {"args": arguments, "rng_state": rng_state, "num_floating_point_operations_so_far": 0}
