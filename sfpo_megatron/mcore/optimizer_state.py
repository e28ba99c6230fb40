"""Megatron's optimizers to sharded state and back, past what upstream gets wrong.

The DistributedOptimizer asks itself for what it saves of a model param and to put it back.
`fp32_states` answers both with fp32 main param and moments, whoever holds them. What it is for
(0.16.1):

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
  inner copies, which Adam steps: left out, for `_set` writes both in place.
- What is gathered of several buckets is shifted (gathered_states.py).
- It collects garbage each time: a third of a second with all that an RL process has imported.
- Loaded param groups bring the settings of the run that was saved; this run's own count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sfpo_megatron.checkpoints.store import CheckpointError
from sfpo_megatron.mcore.gathered_states import gathered_states
from sfpo_megatron.mcore.shards.precision_aware import join, split

MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells the param groups of a run apart."""


def members(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of this rank that have params."""
    chained = isinstance(optimizer, ChainedOptimizer)
    found = list(optimizer.chained_optimizers) if chained else [optimizer]
    return [member for member in found if not getattr(member, "is_stub_optimizer", False)]


def sharded(optimizer: MegatronOptimizer, model: Any, metadata: Any, *, loading: bool) -> Any:
    """The optimizer's part of a sharded state dict. Collective: data-parallel ranks gather."""
    for member in members(optimizer):
        _make_states(member)
    gc.freeze()  # leaves nothing to look through
    try:
        with fp32_states(optimizer):
            state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    finally:
        gc.unfreeze()
    for group in _param_groups(state):
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]  # of the offloaded optimizer: classes, which no load accepts
    return state


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Of an optimizer's state dict: its own, or one below for each member, or under `optimizer`."""
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
    with fp32_states(optimizer):
        optimizer.load_state_dict(state)
    for member in all_members:
        _unshare_step_counts(member)


def _by_member(all_members: list[Any], state: dict[Any, Any]) -> dict[Any, Any]:
    """`state` as this run divides it, where that is not as it was saved: under expert parallelism,
    and only then, experts have an optimizer of their own. What is saved of a param has the param's
    name; the step count and the loss scale, which all share, stand once for each optimizer."""
    numbers = [key for key in state if isinstance(key, int)]
    shared = {key: value for key, value in state.items() if not isinstance(key, int)}
    saved = [part for part in (shared, *(state[n] for n in numbers)) if "optimizer" in part]
    if len(saved) == len(all_members):
        return state
    if not all(isinstance(member, DistributedOptimizer) for member in all_members):
        raise CheckpointError(
            f"found the state of {len(saved)} optimizers, expected {len(all_members)}: load it "
            "with the parallel.expert that it was saved with, or set "
            "megatron.ddp.use_distributed_optimizer: true"
        )
    (step,) = {group["step"] for part in saved for group in _param_groups(part) if "step" in group}
    parts = []
    for index, member in enumerate(all_members):
        own = member.state_dict()["optimizer"]
        for group in own["param_groups"]:
            group["step"] = step
        mine = shared if len(all_members) == 1 else state[index]
        parts.append(saved[0] | mine | {"optimizer": own})
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _keep_settings(member: Any, state: Any) -> None:
    """Put this run's lr, betas, kernel... into the loaded param groups; the step count stays. Newer
    releases also tell groups apart by settings that may have changed (0.19: max_lr)."""

    def kind(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name) for name in _KINDS)

    mine = {kind(group): group for group in member.optimizer.param_groups}
    for group in _param_groups(state):
        settings = mine.get(kind(group), {})
        group.update({n: value for n, value in settings.items() if n not in ("params", "step")})


def _unshare_step_counts(member: Any) -> None:
    counts = []
    for stepper in _steppers(member):
        for each in stepper.state.values():
            if isinstance(each.get("step"), Tensor):
                each["step"] = each["step"].clone()
                counts.append(float(each["step"]))
    if counts and isinstance(member.optimizer, HybridDeviceOptimizer):
        for stepper in _steppers(member):
            if not isinstance(stepper, torch.optim.Adam | torch.optim.AdamW):
                for group in stepper.param_groups:  # the fused kernel beside torch's on the host
                    group["step"] = int(counts[0])


def _steppers(member: Any) -> list[Any]:
    return list(getattr(member.optimizer, "sub_optimizers", [member.optimizer]))


def _make_states(member: Any) -> None:
    """As the first step would make them: zero moments, no step taken. TransformerEngine's and
    Apex's, which keep no step count there, are made by Megatron."""
    for stepper in _steppers(member):
        for param in (p for group in stepper.param_groups for p in group["params"]):
            if stepper.state.get(param):
                continue
            if isinstance(stepper, torch.optim.Adam | torch.optim.AdamW):
                stepper.state[param] = {
                    # on the param's device, as the fused kernel wants it
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    **{name: torch.zeros_like(param.data) for name in MOMENTS},
                }
            elif hasattr(stepper, "store_param_remainders"):
                remainders = stepper.store_param_remainders and param.dtype == torch.bfloat16
                stepper.initialize_state(param, remainders)
    if isinstance(member.optimizer, HybridDeviceOptimizer):
        member.optimizer._sync_sub_optimizers_state_to_hdo()


@contextmanager
def fp32_states(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, DistributedOptimizers save and load fp32 main params and moments, nothing else."""
    found = [m for m in members(optimizer) if isinstance(m, DistributedOptimizer)]
    for member in found:
        member._get_main_param_and_optimizer_states = partial(_get, member)
        member._set_main_param_and_optimizer_states = partial(_set, member)
        member.get_parameter_state_dp_zero = partial(gathered_states, member, _get)
        if isinstance(member.optimizer, HybridDeviceOptimizer):
            member.optimizer.load_state_dict = lambda state: None
            member.optimizer._sync_hdo_state_to_sub_optimizers = lambda: None
    try:
        yield
    finally:
        for member in found:
            del member._get_main_param_and_optimizer_states
            del member._set_main_param_and_optimizer_states
            del member.get_parameter_state_dp_zero
            if isinstance(member.optimizer, HybridDeviceOptimizer):
                del member.optimizer.load_state_dict
                del member.optimizer._sync_hdo_state_to_sub_optimizers


def _stepped(member: Any, model_param: Tensor) -> Any:
    """What the optimizer holds of this rank's shard of `model_param`."""
    group, index = member.model_param_group_index_map[model_param]
    return member.optimizer.param_groups[group]["params"][index]


def _get(member: Any, model_param: Tensor) -> dict[str, Tensor]:
    adam, shard = member.optimizer, _stepped(member, model_param)
    if isinstance(adam, HybridDeviceOptimizer):
        state = adam.state[shard]
        return {"param": adam.param_to_inner_param[shard], **{n: state[n] for n in MOMENTS}}
    if not member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return {"param": shard, **{name: adam.state[shard][name] for name in MOMENTS}}
    moments = {name: adam.get_unscaled_state(shard, name) for name in MOMENTS}
    master = adam.state[shard]["master_param"]
    if shard.dtype == torch.float32:
        return {"param": shard, **moments}  # stepped in place; the master beside it is stale
    if master.dtype == torch.int16:
        main = torch.empty(shard.shape, dtype=torch.float32, device=shard.device)
        join(shard, master, main)
        return {"param": main, **moments}
    return {"param": adam.get_unscaled_state(shard, "master_param"), **moments}


@torch.no_grad()
def _set(member: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    adam, shard = member.optimizer, _stepped(member, model_param)
    if isinstance(adam, HybridDeviceOptimizer):
        inner = adam.param_to_inner_param[shard]
        inner.copy_(tensors["param"])
        if inner is not shard:
            shard.copy_(inner)
        for name in MOMENTS:
            adam.state[shard][name].copy_(tensors[name])
        return
    if not member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        shard.copy_(tensors["param"])
        for name in MOMENTS:
            adam.state[shard][name].copy_(tensors[name])
        return
    for name in MOMENTS:
        adam.set_scaled_state(shard, name, tensors[name].to(shard.device))
    main = tensors["param"].to(shard.device).contiguous()
    master = adam.state[shard]["master_param"]
    if shard.dtype == torch.bfloat16 and master.dtype == torch.int16:
        split(main, shard.data, master)
        return
    if shard.dtype == torch.float32:
        shard.copy_(main)
    adam.set_scaled_state(shard, "master_param", main)
