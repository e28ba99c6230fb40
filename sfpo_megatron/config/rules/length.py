"""When a run ends, and what a warm start measures: rules over several sections. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig


def length(config: RunConfig) -> Iterator[Problem]:
    """Epochs have rows to be counted, a target has evaluations to reach it."""
    if config.train.num_epochs is not None and config.debug.train_only is not None:
        yield Problem(
            "train.num_epochs",
            f"{config.train.num_epochs} with debug.train_only",
            "a number of steps: saved rollouts have no epochs",
            "set train.num_steps, and train.num_epochs to null",
        )
    stop_at = config.eval.stop_at
    if stop_at is not None and config.eval.every == 0:
        yield Problem(
            "eval.every",
            f"0 with eval.stop_at {stop_at:g}",
            "1 or more",
            "set it to the train steps between evaluations: only one of them ends the run early",
        )
    without = "debug.train_only" if config.debug.train_only else "no source in data.eval"
    if stop_at is not None and (config.debug.train_only or not config.data.eval):
        yield Problem(
            "eval.stop_at",
            f"{stop_at:g} with {without}",
            "held-out prompts and engines",
            "add a source under data.eval, or unset eval.stop_at",
        )
    sft = config.sft
    if sft.eval_every and not sft.holdout and not config.data.eval:
        yield Problem(
            "sft.eval_every",
            f"{sft.eval_every} with no source in data.eval",
            "rows for the held-out loss",
            "add a source under data.eval, or set sft.holdout",
        )
