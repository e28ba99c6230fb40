"""`rollout.async_steps: 1`, dynamic sampling and selective rollouts in whole runs.

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


def run(
    folder: Path, *, num_steps: int = 4, data: dict[str, Any] | None = None, **rollout: Any
) -> tuple[list[dict[str, Any]], Path]:
    folder.mkdir()
    model = digits.make_model(folder / "model")
    config = digits.write_config(
        folder,
        model,
        parallel={"tensor": 1},
        train={"num_steps": num_steps},
        data=data or {},
        rollout={"max_prompt_tokens": 16, "max_response_tokens": 8, **rollout},
    )
    output = digits.train(config)
    lines, evals = digits.read_metrics(folder / "run")
    assert [line["step"] for line in evals] == [0, num_steps], output
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


def test_prompts_that_teach_nothing_are_passed_over(tmp_path: Path) -> None:
    """64 prompts, 16 a step: from the fifth step on the model has seen all of them, and an
    untrained one fails nearly all."""
    lines, _ = run(tmp_path / "d", num_steps=8, data={"skip_zero_variance": True})
    spared = [line["num_rollouts_spared"] for line in lines]
    assert spared[:4] == [0] * 4 and sum(spared[4:]) > 0
    assert all(spared_now % 8 == 0 for spared_now in spared)
    assert all(line["num_rollouts"] == 128 * line["step"] for line in lines)
    assert lines[-1]["explore_failed"] < 0.5 < lines[-1]["explore_solved"]
