"""Whether a run goes on with other settings of the entropy gate than it has closed by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from sfpo_megatron.config.tree import RunConfig

_RULE = (
    "entropy_window",
    "entropy_zscore_threshold",
    "entropy_relative_threshold",
    "entropy_patience",
    "entropy_window_excludes_newest",
    "entropy_warmup_steps",
    "trigger",
)
"""Settings of the section sfpo that decide when the gate closes."""


def closed_by_others(config: RunConfig, state: Mapping[str, Any]) -> Iterator[str]:
    """Say that a gate that has latched stays closed, where the run goes on with other settings of
    its rule: they decide nothing any more. `state`: run_state.json of the checkpoint."""
    then, now = state["config"].get("sfpo", {}), asdict(config.sfpo)
    changed = [key for key in _RULE if key in then and then[key] != now[key]]
    decides = config.sfpo.latch and config.sfpo.num_fast_passes > 0
    if changed and decides and state.get("gate", {}).get("tripped"):
        said = ", ".join(f"sfpo.{key}: {then[key]} -> {now[key]}" for key in changed)
        yield (
            f"warning: the entropy gate had closed by step {state['step']} under other settings "
            f"({said}) and stays closed: sfpo.latch=false lets it open again, or go back to a "
            "checkpoint from before with --fresh checkpoint.resume=DIR"
        )
