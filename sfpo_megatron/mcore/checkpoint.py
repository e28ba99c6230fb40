"""Model, optimizer, LR schedule and RNG of every rank, in Megatron's torch_dist format.

    writing = begin_save(policy, directory, step=50, form="native")   # planned, copied to the host
    digests = writing.finish()                                        # on the disk, all ranks
    load(policy, directory)                                           # under any layout

Optimizer state is `fully_reshardable`: main params and moments in the shapes of the model params,
gathered over data-parallel ranks when saved, so that any TP, PP, VPP, EP and DP loads them. The
tensors and their names are Megatron-LM's; `megatron_lm` adds what its loader looks for beside them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    StateDict,
    is_main_replica,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch.distributed.checkpoint import CheckpointException

from sfpo_megatron.checkpoints.store import CheckpointError, Format
from sfpo_megatron.checkpoints.torch_records import read_metadata, tensor_sizes
from sfpo_megatron.checkpoints.weight_keys import weight_places
from sfpo_megatron.host.listing import paths_in
from sfpo_megatron.mcore import optimizer_state
from sfpo_megatron.mcore.megatron_lm import megatron_lm_extras
from sfpo_megatron.mcore.model import unwrapped
from sfpo_megatron.mcore.rng import RNG_FILES, load_rng, rng_file, save_rng
from sfpo_megatron.mcore.setup import Policy
from sfpo_megatron.mcore.writing import Writing, start_writing

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo by data-parallel rank 0 alone: 12 bytes a param of host memory there.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def begin_save(policy: Policy, directory: Path, *, step: int, form: Format) -> Writing:
    """Copy the state to the host and begin to write it into the empty `directory`. Training may go
    on when this returns. Collective."""
    policy.shards.params_ready()
    state = _model_state(policy)
    state["optimizer"] = optimizer_state.sharded(
        policy.optimizer, dict(state), dict(_CONTENT), loading=False
    )
    state["opt_param_scheduler"] = policy.scheduler.state_dict()
    state |= {"iteration": step, "checkpoint_version": 3.0}
    if form == "megatron_lm":
        state |= megatron_lm_extras(policy, step)
    _ask_for_room(policy, state, directory)
    writing = start_writing(state, directory, content=dict(_CONTENT))
    save_rng(rng_file(directory, dist.get_rank()))
    return writing


def load(policy: Policy, directory: Path) -> None:
    """Everything that `begin_save` saved; RNG where the number of ranks is the same. Collective."""
    state = _model_state(policy)
    optimizer = optimizer_state.sharded(policy.optimizer, dict(state), dict(_CONTENT), loading=True)
    loaded = _read(policy, directory, state | {"optimizer": optimizer})
    optimizer_state.load(policy.optimizer, loaded["optimizer"])
    policy.scheduler.num_steps = 0
    policy.scheduler.step(increment=loaded["opt_param_scheduler"]["num_steps"])
    same_ranks = len(paths_in(directory, begin=RNG_FILES)) == dist.get_world_size()
    if same_ranks:
        load_rng(rng_file(directory, dist.get_rank()))


def load_weights(policy: Policy, directory: Path) -> None:
    """The model params alone, of a checkpoint by Megatron-LM or by us; the optimizer starts from
    them anew. CheckpointError where it has other weights than the model. Collective."""
    # Megatron would drop what the model has not, and fill up a short vocabulary with zeros.
    weight_places(directory, policy.shape, tensor_sizes(directory))
    _read(policy, directory, _model_state(policy))
    policy.shards.take_from_model()


def _model_state(policy: Policy) -> ShardedStateDict:
    """`model`, or with several chunks `model0`, `model1`...: as Megatron-LM names them."""
    several = len(policy.chunks) > 1
    return {
        f"model{index if several else ''}": unwrapped(chunk).sharded_state_dict(
            metadata=dict(_CONTENT)
        )
        for index, chunk in enumerate(policy.chunks)
    }


def _read(policy: Policy, directory: Path, state: ShardedStateDict) -> StateDict:
    """Load `state` and put the model params in. The rest is returned."""
    read_metadata(directory / ".metadata")  # raises where the pickle names foreign code
    names = [name for name in state if name.startswith("model")]
    for name in names:
        _drop_extra_state(policy, state[name], directory)
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except (KeyError, CheckpointingException, CheckpointException) as error:
        # The last is no Exception: nothing above would catch it.
        raise CheckpointError(
            f"{directory}: does not fit this model ({_first_line(error)}); resume with the "
            "model.path of the run that was saved, or set the run aside with --fresh"
        ) from error
    for chunk, name in zip(policy.chunks, names, strict=True):
        # What is not in the state dict: extra state, of layers that have none here.
        keys = unwrapped(chunk).load_state_dict(loaded[name], strict=False)
        odd = [k for k in (*keys.missing_keys, *keys.unexpected_keys) if "_extra_state" not in k]
        if odd:
            raise CheckpointError(f"{directory}: {name}: found other params than these: {odd[:5]}")
    return loaded


def _drop_extra_state(policy: Policy, model: ShardedStateDict, directory: Path) -> None:
    """Layers of TransformerEngine ask for extra state, which others have not saved; torch layers
    have none, and it would be unpickled."""
    saved = load_sharded_metadata(str(directory))
    for name in [n for n, value in model.items() if isinstance(value, ShardedObject)]:
        if policy.capabilities.layers != "te" or model[name].unique_key not in saved:
            del model[name]


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = error.failures[min(error.failures)]
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)


# --- room on the disk -------------------------------------------------------------------------


def _ask_for_room(policy: Policy, state: ShardedStateDict, directory: Path) -> None:
    """CheckpointError before the first byte if the disk cannot hold it. Collective."""
    mine = sum(_bytes(value) for value in nested_values(state))
    needed = int(policy.control.sum(torch.tensor([mine], dtype=torch.int64)))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory.parent}: found {free / 2**20:,.0f} MiB free, expected "
            f"{needed / 2**20:,.0f} MiB for a checkpoint; the one before is kept: free space, or "
            "lower checkpoint.keep_last"
        )


def _bytes(value: ShardedTensor | ShardedTensorFactory | ShardedObject | torch.Tensor) -> int:
    if not isinstance(value, ShardedTensor | ShardedTensorFactory) or value.data is None:
        return 0
    return value.data.nbytes if is_main_replica(value.replica_id) else 0
