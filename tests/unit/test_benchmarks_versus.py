"""benchmarks/vs_trl.py's own arithmetic, and what it gives both trainers.

Not exercised here: the runs themselves; TRL is not installed where the tests are.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.versus import ours, race, rewards, rows, theirs
from benchmarks.versus.cases import CASES, Case, Material, Step, config_of
from benchmarks.versus.theirs import LAYOUTS
from sfpo_megatron.config.load import load_config
from sfpo_megatron.planner.time import forward_flops
from sfpo_megatron.types import Prompt

ROOT = Path(__file__).parents[2]
MIDDLE = next(case for case in CASES if case.name == "middle")


def step(seconds: float, *, accuracy: float = 0.5, response_tokens: float = 100.0) -> Step:
    return Step(
        seconds=seconds,
        rollouts_s=0.25 * seconds,
        passes_s=0.75 * seconds,
        response_tokens=response_tokens,
        accuracy=accuracy,
    )


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ours_is_what_the_case_says(case: Case, tmp_path: Path) -> None:
    """It makes as many sweeps and optimizer steps; our config's check knows every key."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config_of(case, tmp_path)))
    config = load_config(str(file))
    assert config.sfpo.num_fast_passes + 1 == case.sweeps
    assert config.train.prompts_per_step * config.train.group_size == case.num_rollouts
    assert config.parallel.data == config.rollout.num_engines == 2
    # TRL's batch of a process is a whole number of rollouts, and a batch of whole groups.
    assert case.num_rollouts % (case.minibatches * 2) == 0


@pytest.fixture
def row(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """64 rollouts of 50 + 100 tokens: TRL takes 6 and 8 s in its two ways, we take 4."""
    from transformers import Qwen2Config

    shape = Qwen2Config(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=128,
    )  # fmt: skip
    shape.architectures = ["Qwen2ForCausalLM"]
    shape.save_pretrained(tmp_path)
    material = Material(rows=tmp_path, model=tmp_path, config=tmp_path)
    yield rows.row_of(MIDDLE, material, runs(), 1e9)


def runs() -> rows.Runs:
    """Three steps of each: of 4 s in the median, 2 of them in passes; TRL's of 8 and of 6 s."""
    mine = ours.OurStep(
        seconds=4.0,
        rollouts_s=1.0,
        passes_s=2.0,
        response_tokens=100.0,
        accuracy=0.5,
        phases_s={**dict.fromkeys(ours.PHASES, 0.0), "generate": 1.0, "passes": 2.0},
        num_passes=1,
        tokens=150.0 * 64,
    )
    found = rows.Runs(ours=[mine, replace(mine, seconds=5.0), replace(mine, seconds=3.0)])
    for layout, seconds in zip(LAYOUTS, (8.0, 6.0), strict=True):
        found.trl[layout.name] = [step(seconds)] * 3
    return found


def test_the_ratio_is_to_the_faster_layout(row: dict[str, Any]) -> None:
    assert row["ours_s"] == 4.0 and row["trl_s"] == 6.0 and row["ratio"] == 1.5
    assert row["trl_layout"] == "1 process of 2 threads" and row["reached"]
    assert "| 1.50 | 1.1 | yes |" in rows.line(row)
    assert len(rows.line(row).split("|")) == len(rows.HEADER.split("|"))
    assert "generate 1.00" in rows.where_time_goes(row)


def test_the_floor_is_three_forwards_at_the_peak(row: dict[str, Any], tmp_path: Path) -> None:
    """Worked out again: 64 rollouts of 150 tokens, at 1 GFLOP/s."""
    from sfpo_megatron.families.shape import model_shape, read_hf_config

    forward = 64 * 150 * forward_flops(model_shape(read_hf_config(tmp_path)), 150)
    assert row["passes_floor_s"] == pytest.approx(3 * forward / 1e9)
    assert row["logprob_floor_s"] == pytest.approx(forward / 2 / 1e9)
    assert row["passes_of_peak"] == pytest.approx(row["passes_floor_s"] / 2.0)
    assert row["trl_passes_of_peak"] == pytest.approx(row["passes_floor_s"] / 4.5)


def test_the_share_of_the_peak_has_a_verdict(row: dict[str, Any]) -> None:
    """Far below 70 % at 1 GFLOP/s of this shape, or at it: the floor is a share of 2 s."""
    assert row["least_share"] == 0.7 and row["share_reached"] == (row["passes_of_peak"] >= 0.7)
    for share, verdict in ((0.69, "NO"), (0.7, "yes")):
        told = rows.line(row | {"passes_of_peak": share, "share_reached": share >= 0.7})
        assert f"| {share:.0%} | 70% | {verdict} |" in told


@pytest.mark.parametrize("peak_flops", [1e8, 1e12])
def test_the_verdict_is_of_this_runs_peak(
    tmp_path: Path, row: dict[str, Any], peak_flops: float
) -> None:
    """The same passes are above 70 % of a low peak, and below that of a high one."""
    material = Material(rows=tmp_path, model=tmp_path, config=tmp_path)
    assert rows.row_of(MIDDLE, material, runs(), peak_flops)["share_reached"] == (peak_flops == 1e8)


def test_trl_races_in_the_layout_that_won() -> None:
    rows_of = [
        {"case": "middle", "trl_layout": LAYOUTS[0].name},
        {"case": "short", "trl_layout": LAYOUTS[1].name},
    ]
    assert race.faster_layout(rows_of) == LAYOUTS[1]
    assert race.faster_layout(rows_of[:1]) is None


def test_each_arm_races_with_three_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both trainers are given the seed, and TRL the layout; the runs themselves are not made."""
    begun: list[Any] = []
    material = Material(rows=tmp_path, model=tmp_path, config=tmp_path / "config.yaml")
    monkeypatch.setattr(race, "prepare", lambda case, folder: material)

    def ran(given: tuple[Any, ...], seed: int) -> list[Step]:
        begun.append((*given, seed))
        return [step(1.0 + seed, accuracy=0.9 if seed < 2 else 0.1)] * 3

    monkeypatch.setattr(ours, "run", lambda m, n, lr, log, seed: ran(("ours", lr), seed))
    monkeypatch.setattr(
        theirs, "run",
        lambda python, layout, case, m, n, lr, log, seed: ran((layout.name, case.sweeps), seed),
    )  # fmt: skip
    found = list(race.run(tmp_path, tmp_path, LAYOUTS[1], quick=False))
    name = LAYOUTS[1].name
    assert begun == [
        one
        for seed in (0, 1, 2)
        for one in (("ours", 4e-4, seed), (name, 1, seed), (name, 4, seed))
    ]
    assert [one["seed"] for one in found] == [0] * 3 + [1] * 3 + [2] * 3
    assert [one["seconds"] for one in found[::3]] == [4.0, 8.0, None]
    assert found[1]["layout"] == name and race.line(found[-1]).endswith("| 2 | never | None")
    medians = race.medians(found)
    assert [one["seconds"] for one in medians] == [8.0] * 3
    assert race.median_line(medians[1]) == "TRL, 1 sweep: 8.0 (median of 3)"
    assert len(list(race.run(tmp_path, tmp_path, LAYOUTS[1], quick=True))) == 3


def test_accuracy_is_reached_by_three_batches_together() -> None:
    """The first step's time, which is not seen, counts as the second's."""
    steps = [step(1.0, accuracy=a) for a in (0.7, 0.9, 0.6, 0.7, 0.9, 0.9)]
    assert race.reached(steps) == {"seconds": 7.0, "steps": 7, "accuracy": 0.75}
    assert race.reached(steps[:5])["seconds"] is None


def test_the_rewards() -> None:
    prompt = Prompt(id="", text="q", token_ids=(), question="q", answer="12")
    assert rewards.right(" 12", prompt) == 1 and rewards.right("1", prompt) == 0
    assert rewards.even_length("ab", prompt) == 1 and rewards.even_length("abc", prompt) == 0


def test_the_script_starts() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/vs_trl.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "GRPOTrainer" in done.stdout, done.stderr
    assert "--no-accuracy" in done.stdout
