"""What one class of optimizers keeps of the params that it steps, as one record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(kw_only=True, frozen=True, slots=True)
class StepperKind:
    """A class of optimizers, or several that keep the same."""

    name: str
    """The value of Megatron's setting `optimizer`."""
    classes: tuple[str, ...]
    """Names, since TransformerEngine's and Apex's classes cannot be imported everywhere."""
    moments: tuple[str, ...]
    """Names in a param's state of what has the param's shape; checkpoints have the same names."""
    count: Literal["param", "group"] | None
    """The place of its step count: a tensor in each param's state, an int in each param group."""
    make_state: Callable[[torch.optim.Optimizer, Tensor], None]
    """Completes the state of a param as the first step would make it, for a checkpoint."""
