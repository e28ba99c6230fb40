"""Configs of runs whose prompts are read, and a source of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from made.configs import run_config

from sfpo_megatron.config.tree import DataSource, RunConfig

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}


def sums(size: int, **args: Any) -> DataSource:
    return DataSource(source="reasoning_gym", task="chain_sum", args={**SUMS, **args}, size=size)


def make_config(
    train: Sequence[DataSource],
    held_out: Sequence[DataSource] = (),
    seed: int = 0,
    max_prompt_tokens: int = 64,
    **data: Any,
) -> RunConfig:
    return run_config(
        seed=seed,
        rollout={"max_prompt_tokens": max_prompt_tokens},
        data={"train": tuple(train), "eval": tuple(held_out), **data},
    )
