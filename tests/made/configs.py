"""The one minimal run: a record for tests that take a config, a file for those that load one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.tree import DataSource, RunConfig

AIW = Path(__file__).with_name("aiw.yaml")
"""A whole config, warm start included, whose problems need no file."""
SUMS = {"source": "reasoning_gym", "task": "chain_sum", "size": 100}
RUN: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "model"},
    "data": {"train": [SUMS]},
}
"""What run.yaml has to say at least. All paths are relative to the working directory."""
EVALUATED = {"train": [SUMS], "eval": [SUMS]}
"""`data` of a run that `check` warns of nothing about."""

FOR_A_GPU = (
    "model.dtype=bfloat16",
    "rollout.gpu_memory_utilization=0.9",
    "megatron.ddp.overlap_grad_reduce=true",
    "megatron.ddp.overlap_param_gather=true",
)
"""Overrides of a run that `check` recommends nothing more for on a GPU."""


def run_config(**sections: Any) -> RunConfig:
    """Defaults, but for the keys and sections given; a section as a record, or its settings by
    name. Its model and its data are nowhere."""
    unused = DataSource(source="jsonl", path="unused")
    tree: dict[str, Any] = {"model": {}, "data": {}} | sections
    for name, fallback in (("model", {"path": "unused"}), ("data", {"train": (unused,)})):
        if isinstance(tree[name], Mapping):
            tree[name] = fallback | dict(tree[name])
    kinds = get_type_hints(RunConfig)
    given = {n: kinds[n](**v) if isinstance(v, Mapping) else v for n, v in tree.items()}
    return RunConfig(**({"output_dir": "unused"} | given))


def write_run(folder: Path | str = ".", **sections: Any) -> Path:
    """FOLDER/run.yaml: RUN with these keys and whole sections in place of its own."""
    file = Path(folder, "run.yaml")
    file.write_text(json.dumps(RUN | sections))  # JSON is YAML
    return file


def run_check(*overrides: str, **arguments: Any) -> list[str]:
    """The warnings of `check run.yaml` with these overrides; ConfigError where it refuses."""
    config = load_config("run.yaml", list(overrides))
    return [str(warning) for warning in check_config(config, file="run.yaml", **arguments)]
