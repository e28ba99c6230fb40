"""Megatron's optimizers to sharded state and back, past what upstream gets wrong.

What a checkpoint holds of a param, the binding of its optimizer's kind says (shards/): fp32 main
param and moments, whoever holds them. What it is for (0.16.1):

- Without TransformerEngine and Apex, the setter copies every key of torch's state and finds no
  `step` in what was loaded: KeyError.
- load_state_dict gives all params ONE `step` tensor: the next Adam step counts it up once a param,
  and the bias correction is silently wrong. `load` gives each its own.
- state_dict() asserts that there is a step count: a state that no step has made yet is made here.
- With the precision-aware optimizer the getter returns int16 remainders, which are saved as if they
  were the main param; of fp32 params it returns FusedAdam's "master_param", a copy that is never
  stepped.
- Megatron's init_state_fn calls FusedAdam.initialize_state without an argument that
  TransformerEngine 2.1 and later require.
- With CPU offload, load_state_dict fails on params that have no fp32 copy, and does not load the
  inner copies, which Adam steps.
- What is gathered of several buckets is shifted (gathered_states.py).
- It collects garbage each time: a third of a second with all that an RL process has imported.
- A rank that gathers nothing has `param_state: None` among what rank 0 writes for all: each save
  warns that the ranks differ.
- Loaded param groups bring the settings of the run that was saved; this run's own count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sfpo_megatron.checkpoints.store import CheckpointError
from sfpo_megatron.mcore.shards.kinds import bind, members
from sfpo_megatron.mcore.shards.main_params import MainParams

_KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells the param groups of a run apart."""


def sharded(optimizer: MegatronOptimizer, model: Any, metadata: Any, *, loading: bool) -> Any:
    """The optimizer's part of a sharded state dict. Collective: data-parallel ranks gather."""
    bindings = [bind(member) for member in members(optimizer)]
    for binding in bindings:
        binding.make_states()
    gc.freeze()  # leaves nothing to look through
    try:
        with fp32_states(bindings):
            state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    finally:
        gc.unfreeze()
    for group in _param_groups(state):
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]  # of the offloaded optimizer: classes, which no load accepts
    for part in (state, *(below for name, below in state.items() if isinstance(name, int))):
        if part.get("param_state", part) is None:
            del part["param_state"]
    return state


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The param groups in an optimizer's state dict: its own, or below for each member, or under
    `optimizer`."""
    yield from state.get("param_groups", ())
    for name, below in state.items():
        if name == "optimizer" or isinstance(name, int):
            yield from _param_groups(below)


def load(optimizer: MegatronOptimizer, state: Any) -> None:
    """Inverse of `sharded`. No communication."""
    all_members = members(optimizer)
    state = _by_member(all_members, state)
    parts = [state] if len(all_members) == 1 else [part for _, part in sorted(state.items())]
    for member, part in zip(all_members, parts, strict=True):
        _keep_settings(member, part)
    bindings = [bind(member) for member in all_members]
    with fp32_states(bindings):
        optimizer.load_state_dict(state)
    for binding in bindings:
        binding.after_load()


def _by_member(all_members: list[Any], state: dict[Any, Any]) -> dict[Any, Any]:
    """`state` as this run divides it, where that is not as it was saved: under expert parallelism,
    and only then, experts have an optimizer of their own. What is saved of a param has the param's
    name; the step count and the loss scale, which all share, stand once for each optimizer."""
    numbers = [key for key in state if isinstance(key, int)]
    shared = {key: value for key, value in state.items() if not isinstance(key, int)}
    parts = [shared, *(state[number] for number in numbers)]
    # An FP32Optimizer's is torch's own, without a key above its param groups.
    saved = [part for part in parts if part.keys() & {"optimizer", "param_groups"}]
    if len(saved) == len(all_members):
        return state
    if not all(isinstance(member, DistributedOptimizer) for member in all_members):
        raise CheckpointError(
            f"found the state of {len(saved)} optimizers, expected {len(all_members)}: load it "
            "with the parallel.expert that it was saved with, or set "
            "megatron.ddp.use_distributed_optimizer: true"
        )
    (step,) = {group["step"] for part in saved for group in _param_groups(part) if "step" in group}
    divided = []
    for index, member in enumerate(all_members):
        own = member.state_dict()["optimizer"]
        for group in own["param_groups"]:
            group["step"] = step
        mine = shared if len(all_members) == 1 else state[index]
        divided.append(saved[0] | mine | {"optimizer": own})
    return divided[0] if len(divided) == 1 else dict(enumerate(divided))


def _keep_settings(member: Any, state: Any) -> None:
    """Put this run's lr, betas, kernel... into the loaded param groups; the step count stays. Newer
    releases also tell groups apart by settings that may have changed (0.19: max_lr)."""

    def kind(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name) for name in _KINDS)

    mine = {kind(group): group for group in member.optimizer.param_groups}
    for group in _param_groups(state):
        settings = mine.get(kind(group), {})
        group.update({n: value for n, value in settings.items() if n not in ("params", "step")})


@contextmanager
def fp32_states(bindings: Sequence[MainParams]) -> Iterator[None]:
    """Inside, Megatron saves and loads fp32 main params and moments, nothing else of a param."""
    with ExitStack() as stack:
        for binding in bindings:
            stack.enter_context(binding.saved())
        yield
