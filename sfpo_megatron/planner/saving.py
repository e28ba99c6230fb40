"""How long a run goes without a checkpoint, by the seconds that `plan` predicts. No torch."""

from __future__ import annotations

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.time import Workload, step_seconds

_GPU = "h100-80gb"  # another kind changes no hours into minutes
_AFFORDED_S = 7200.0
"""Seconds of work that a run may lose: the interval that is advised."""


def saving_advice(shape: ModelShape, config: RunConfig, *, job_s: float) -> str | None:
    """What to say of a job of `job_s` seconds that would end without a checkpoint of its own; None
    where there is one, or where none is asked for. `parallel.data` must be a number."""
    train, every = config.train, config.checkpoint.every
    step_s = step_seconds(shape, config, GPUS[_GPU], Workload.guessed(config)).total
    steps = every if train.num_steps is None else min(every, train.num_steps)  # the last is saved
    if not config.saves_state or steps * step_s <= job_s:
        return None
    return (
        f"checkpoint.every: found {every}, {every * step_s / 3600:.0f} hours of steps of "
        f"{step_s:.0f} s as `plan` predicts them, expected a checkpoint within the job's "
        f"{job_s / 3600:.1f} hours: a step that is given up at their end costs all since the "
        f"last one; set checkpoint.every={max(int(_AFFORDED_S / step_s), 1)}"
        + (", and a longer --time" if step_s > job_s else "")
    )
