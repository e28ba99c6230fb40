"""Adam's state behind Megatron's optimizers: moments and step counts, torch's or TE/Apex's way.

torch keeps a `step` tensor in each param's state; TransformerEngine's and Apex's fused Adam keep an
int in each param group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def _states(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """In the order of the params, for those that have state."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if optimizer.state.get(param):
                yield optimizer.state[param]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """exp_avg and exp_avg_sq of every param that has taken a step, the optimizer's own storage."""
    return [state[key] for state in _states(optimizer) for key in ("exp_avg", "exp_avg_sq")]


def step_counts(optimizer: torch.optim.Optimizer) -> list[float]:
    """One a param (torch) or one a group (TE, Apex); empty before the first step."""
    per_param = [float(state["step"]) for state in _states(optimizer) if "step" in state]
    return per_param or [float(g["step"]) for g in optimizer.param_groups if "step" in g]


def set_step_counts(optimizer: torch.optim.Optimizer, counts: Sequence[float]) -> list[float]:
    """Take what this optimizer keeps from the front of `counts`; returns the rest."""
    rest = list(counts)
    states = [state for state in _states(optimizer) if "step" in state]
    for state in states:
        state["step"].fill_(rest.pop(0))
    if not states:
        for group in optimizer.param_groups:
            if "step" in group:
                group["step"] = int(rest.pop(0))
    return rest
