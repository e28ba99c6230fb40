"""`rollout.async_steps: 1` and dynamic sampling in whole runs.

Not exercised: several engines, and what staleness does to learning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.full

SAME = ("reward_mean", "loss", "entropy", "grad_norm", "staleness", "num_rollouts")


def run(folder: Path, **rollout: Any) -> tuple[list[dict[str, Any]], Path]:
    folder.mkdir()
    model = digits.make_model(folder / "model")
    config = digits.write_config(
        folder,
        model,
        parallel={"tensor": 1},
        train={"num_steps": 4},
        rollout={"max_prompt_tokens": 16, "max_response_tokens": 8, **rollout},
    )
    output = digits.train(config)
    lines, evals = digits.read_metrics(folder / "run")
    assert [line["step"] for line in evals] == [0, 4], output
    return lines, folder / "run"


def test_one_step_ahead_is_deterministic(tmp_path: Path) -> None:
    """Twice the same weights bit for bit; every batch after the first is one update old."""
    first, where = run(tmp_path / "a", async_steps=1)
    second, other = run(tmp_path / "b", async_steps=1)
    assert [line["staleness"] for line in first] == [0, 1, 1, 1]
    assert [line["weight_version"] for line in first] == [1, 2, 3, 4]
    for a, b in zip(first, second, strict=True):
        assert [a[key] for key in SAME] == [b[key] for key in SAME]
    one, two = (load_file(path / "hf/model.safetensors") for path in (where, other))
    assert all(one[name].equal(two[name]) for name in one)
    # Generator and trainer differ now: by one update, no more.
    assert first[0]["logprob_diff_mean"] < 1e-4 < first[2]["logprob_diff_mean"]


def test_dynamic_sampling_fills_every_batch(tmp_path: Path) -> None:
    lines, _ = run(tmp_path / "c", drop_groups=["zero_variance"], oversample=1.25, max_rounds=3)
    for line in lines:
        assert line["num_rollouts"] == 128 * line["step"]
        assert line["num_groups_generated"] == 20 * line["num_sampling_rounds"]
        dropped = line["num_groups_zero_variance"] + line["num_groups_duplicate"]
        kept = line["num_groups_generated"] - dropped - line["num_groups_surplus"]
        assert kept + line["num_groups_taken_back"] == 16
        assert line["zero_variance_groups"] == line["num_groups_taken_back"] / 16
    assert any(line["num_groups_zero_variance"] > 0 for line in lines)
