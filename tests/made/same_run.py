"""Two runs that have to be one and the same: their metrics but for times, and their policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfpo_megatron.outputs.cost_metrics import without_costs

_BY_ENGINES = ("num_groups_", "num_sampling_", "num_reissued", "num_engine_", "staleness")


def lines(run: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; none before the run has begun."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def timeless(run: Path) -> list[dict[str, Any]]:
    """The same without what a clock wrote."""
    return [without_costs(line) for line in lines(run)]


def assert_same_run(
    run: Path, reference: Path, *, engines: bool = True, but: tuple[str, ...] = ()
) -> None:
    """The same metrics and the same policy, to the last bit. `but`: keys that may differ; a run
    without `engines` has no evaluations and no counts of what they did."""
    expected = timeless(reference)
    if not engines:
        expected = [
            {name: value for name, value in line.items() if not name.startswith(_BY_ENGINES)}
            for line in expected
            if "loss" in line
        ]
    for mine, other in zip(timeless(run), expected, strict=True):
        names = [name for name in {*mine, *other} if mine.get(name) != other.get(name)]
        odd = {name: (mine.get(name), other.get(name)) for name in names}
        assert odd.keys() <= set(but), f"step {other['step']}: {odd}"
    policies = [(folder / "hf/model.safetensors").read_bytes() for folder in (run, reference)]
    assert policies[0] == policies[1]
