"""Checkpoints as far as the start of a run looks at them."""

from __future__ import annotations

import json

from sfpo_megatron.checkpoints.store import RUN_STATE, store_of
from sfpo_megatron.config.tree import RunConfig

RUN = "abcdef012345"


def save(config: RunConfig, step: int, state: str | None = None) -> None:
    """A checkpoint of run RUN, or with another run_state.json."""
    store = store_of(config)
    aside = store.begin(step)
    (aside / "metadata.json").write_text("{}")
    (aside / RUN_STATE).write_text(state or json.dumps({"format": 2, "run_id": RUN, "step": step}))
    store.commit(aside, step, {})
