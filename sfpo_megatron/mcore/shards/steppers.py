"""What steps the main params behind Megatron's optimizers: moments and step counts, of every kind.

An optimizer of Megatron's has one, a HybridDeviceOptimizer several, which may be of two kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sfpo_megatron.mcore.shards.adam import FUSED_ADAM, TORCH_ADAM
from sfpo_megatron.mcore.shards.sgd import SGD
from sfpo_megatron.mcore.shards.stepper import StepperKind

KINDS: tuple[StepperKind, ...] = (TORCH_ADAM, FUSED_ADAM, SGD)
"""All that SFPO knows; others are refused (refused.py)."""


def steppers(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Those that really step: the sub-optimizers of a HybridDeviceOptimizer, else itself."""
    return getattr(optimizer, "sub_optimizers", [optimizer])


def kind_of(stepper: torch.optim.Optimizer) -> StepperKind | None:
    """None for a class that is not known."""
    return next((kind for kind in KINDS if type(stepper).__name__ in kind.classes), None)


def _kinds(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.optim.Optimizer, StepperKind]]:
    for stepper in steppers(optimizer):
        kind = kind_of(stepper)
        assert kind is not None, f"{type(stepper).__name__} was not refused"
        yield stepper, kind


def _params(stepper: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in stepper.param_groups:
        yield from group["params"]


def _states(stepper: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """States in the order of the params, for those that have one."""
    return [stepper.state[param] for param in _params(stepper) if stepper.state.get(param)]


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of what it keeps of each param, in the param's shape."""
    (names,) = {kind.moments for _, kind in _kinds(optimizer)}
    return names


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Moments of every param that has taken a step, the optimizer's own storage.

    ValueError if they are not fp32: TransformerEngine keeps a scale beside lower precisions.
    """
    found = list(_kinds(optimizer))
    for stepper, kind in found:
        for name in kind.moments:
            dtype = getattr(stepper, f"{name}_dtype", torch.float32)
            if dtype != torch.float32:
                raise ValueError(
                    f"megatron.optimizer.{name}_dtype: found {dtype}, expected torch.float32 with "
                    "sfpo.moments restore or reset; set sfpo.moments: keep"
                )
    return [
        state[name]
        for stepper, kind in found
        for state in _states(stepper)
        for name in kind.moments
    ]


def storages(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor of more than one element that the optimizer steps or keeps for that, in a fixed
    order; some share their memory."""
    for stepper in (optimizer, *steppers(optimizer)):
        yield from _params(stepper)
    for stepper in steppers(optimizer):
        for state in _states(stepper):
            yield from (v for v in state.values() if isinstance(v, Tensor) and v.numel() > 1)


def step_counts(optimizer: torch.optim.Optimizer) -> list[float]:
    """One a param (torch) or one a group (TE, Apex); empty before there is any state."""
    counts: list[float] = []
    for stepper, kind in _kinds(optimizer):
        states = _states(stepper)
        if kind.count == "param":
            counts += [float(state["step"]) for state in states]
        elif kind.count == "group" and states:
            counts += [float(group.get("step", 0)) for group in stepper.param_groups]
    return counts


def set_step_counts(optimizer: torch.optim.Optimizer, counts: Sequence[float]) -> list[float]:
    """Take what this optimizer keeps from the front of `counts`; returns the rest."""
    rest = list(counts)
    for stepper, kind in _kinds(optimizer):
        states = _states(stepper)
        if kind.count == "param":
            for state in states:
                state["step"].fill_(rest.pop(0))
        elif kind.count == "group" and states:
            for group in stepper.param_groups:
                group["step"] = int(rest.pop(0))
    return rest


def set_group_counts(optimizer: torch.optim.Optimizer, count: float) -> None:
    """Set those that are kept in param groups."""
    for stepper, kind in _kinds(optimizer):
        for group in stepper.param_groups if kind.count == "group" else ():
            group["step"] = int(count)


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Complete the state of every param as the first step would make it: zero moments, no step."""
    for stepper, kind in _kinds(optimizer):
        for param in _params(stepper):
            kind.make_state(stepper, param)


def unshare_step_counts(optimizer: torch.optim.Optimizer) -> list[float]:
    """Give each param a `step` tensor of its own; their values."""
    counts = []
    for stepper in steppers(optimizer):
        for each in stepper.state.values():
            if isinstance(each.get("step"), Tensor):
                each["step"] = each["step"].clone()
                counts.append(float(each["step"]))
    return counts
