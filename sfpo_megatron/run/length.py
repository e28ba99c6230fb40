"""How many steps a run has: by its config, or by its epochs once its rows have been counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.training import SFTConfig, TrainConfig, batches_in
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.mcore.control import ControlGroup

Section = TypeVar("Section", TrainConfig, SFTConfig)


def train_length(config: RunConfig, control: ControlGroup, num_prompts: int) -> RunConfig:
    """`config` with train.num_steps as a number; `num_prompts` counts on rank 0. Collective where
    there are epochs."""
    num_epochs = config.train.num_epochs
    if num_epochs is None:
        return config
    num_prompts = control.broadcast_json(num_prompts)
    per_step = config.drawn_per_step
    num_steps = batches_in(num_epochs, num_prompts, per_step)
    if not num_steps:
        raise DataError(
            "data.train",
            found=f"{num_prompts} prompts",
            expected=f"at least one batch of {per_step} different ones",
            fix="add prompts, or lower train.prompts_per_step",
        )
    return replace(config, train=_with_steps(config.train, num_steps, "train"))


def sft_length(config: RunConfig, control: ControlGroup, num_examples: int) -> RunConfig:
    """`config` with sft.num_steps as a number; `num_examples` counts on rank 0. Every example is
    learned from num_epochs times: the last step takes what is left. Collective where there are
    epochs."""
    sft = config.sft
    if sft.num_epochs is None:
        return config
    total = sft.num_epochs * control.broadcast_json(num_examples)
    num_steps = -(-total // sft.examples_per_step)
    return replace(config, sft=_with_steps(sft, num_steps, "sft"))


def _with_steps(section: Section, num_steps: int, key: str) -> Section:
    try:
        return section.with_steps(num_steps)
    except FieldError as error:  # a schedule that does not fit in
        raise DataError(
            f"{key}.num_epochs",
            found=f"{section.num_epochs}, which comes to {num_steps} steps",
            expected=error.expected,
            fix=error.fix,
        ) from error


def said_length(num_epochs: int, num_rows: int, num_steps: int, what: str) -> str:
    """What a run says of its length in epochs."""
    times = "epoch" if num_epochs == 1 else "epochs"
    return f"{num_epochs} {times} of {num_rows} {what}: {num_steps} steps"
