"""Adam's state behind Megatron's optimizers: moments and step counts, torch's or TE/Apex's way.

torch keeps a `step` tensor in each param's state; TransformerEngine's and Apex's fused Adam keep an
int in each param group. A HybridDeviceOptimizer steps several of either kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def _steppers(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Those that really step: the sub-optimizers of a HybridDeviceOptimizer, else itself."""
    return getattr(optimizer, "sub_optimizers", [optimizer])


def _states(stepper: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """In the order of the params, for those that have state."""
    for group in stepper.param_groups:
        for param in group["params"]:
            if stepper.state.get(param):
                yield stepper.state[param]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """exp_avg and exp_avg_sq of every param that has taken a step, the optimizer's own storage.

    ValueError if they are not fp32: TransformerEngine keeps a scale beside lower precisions.
    """
    for stepper in _steppers(optimizer):
        for name in _MOMENTS:
            dtype = getattr(stepper, f"{name}_dtype", torch.float32)
            if dtype != torch.float32:
                raise ValueError(
                    f"megatron.optimizer.{name}_dtype: found {dtype}, expected torch.float32 with "
                    "sfpo.moments restore or reset; set sfpo.moments: keep"
                )
    return [
        state[name]
        for stepper in _steppers(optimizer)
        for state in _states(stepper)
        for name in _MOMENTS
    ]


def storages(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor of more than one element that the optimizer steps or keeps for that, in a fixed
    order; some share their memory."""
    for stepper in (optimizer, *_steppers(optimizer)):
        for group in stepper.param_groups:
            yield from group["params"]
    for stepper in _steppers(optimizer):
        for state in _states(stepper):
            yield from (v for v in state.values() if isinstance(v, Tensor) and v.numel() > 1)


def step_counts(optimizer: torch.optim.Optimizer) -> list[float]:
    """One a param (torch) or one a group (TE, Apex); empty before there is any state."""
    counts: list[float] = []
    for stepper in _steppers(optimizer):
        states = list(_states(stepper))
        if _counts_in(states):
            counts += [float(state["step"]) for state in states]
        elif states:
            counts += [float(group.get("step", 0)) for group in stepper.param_groups]
    return counts


def set_step_counts(optimizer: torch.optim.Optimizer, counts: Sequence[float]) -> list[float]:
    """Take what this optimizer keeps from the front of `counts`; returns the rest."""
    rest = list(counts)
    for stepper in _steppers(optimizer):
        states = list(_states(stepper))
        if _counts_in(states):
            for state in states:
                state["step"].fill_(rest.pop(0))
        elif states:
            for group in stepper.param_groups:
                group["step"] = int(rest.pop(0))
    return rest


def _counts_in(states: Sequence[dict[str, Any]]) -> bool:
    """Whether they carry the step count (torch)."""
    return any("step" in state for state in states)
