"""Adam's state, torch's way and TransformerEngine's or Apex's.

torch keeps a `step` tensor in each param's state; TransformerEngine's and Apex's fused Adam keep an
int in each param group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfpo_megatron.mcore.shards.stepper import StepperKind

MOMENTS = ("exp_avg", "exp_avg_sq")


def _torch_state(stepper: torch.optim.Optimizer, param: Tensor) -> None:
    if not stepper.state.get(param):
        stepper.state[param] = {
            # on the param's device, as the fused kernel wants it
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            **{name: torch.zeros_like(param.data) for name in MOMENTS},
        }


def _fused_state(stepper: Any, param: Tensor) -> None:
    """Apex's and older ones, which keep no count there, are made by Megatron."""
    if not stepper.state.get(param) and hasattr(stepper, "store_param_remainders"):
        remainders = stepper.store_param_remainders and param.dtype == torch.bfloat16
        stepper.initialize_state(param, remainders)


TORCH_ADAM = StepperKind(
    name="adam",
    classes=("Adam", "AdamW"),
    moments=MOMENTS,
    count="param",
    make_state=_torch_state,
)
FUSED_ADAM = StepperKind(
    name="adam", classes=("FusedAdam",), moments=MOMENTS, count="group", make_state=_fused_state
)
