"""Configs of runs whose model and data nothing looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    RefitConfig,
    RolloutConfig,
    RunConfig,
)


def run_config(
    *, rollout: Mapping[str, Any] | None = None, refit: Mapping[str, Any] | None = None
) -> RunConfig:
    """Defaults, but for what is given of the two sections."""
    return RunConfig(
        output_dir="unused",
        model=ModelConfig(path="unused"),
        data=DataConfig(train=(DataSource(source="jsonl", path="unused"),)),
        rollout=RolloutConfig(**(rollout or {})),
        refit=RefitConfig(**(refit or {})),
    )
