"""The study of examples/sfpo_vs_grpo: which cell comes next, and what a run came to.

Results are made up here; that a cell really trains is left to the study itself.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made.study_runs import FOLDER, leave, study_modules, tune

from sfpo_megatron.config.load import load_config
from sfpo_megatron.gate import EntropyGate


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The study's modules, with results in a folder of the test's own."""
    yield from study_modules(tmp_path, monkeypatch)


def test_lrs_go_on_until_the_best_is_not_at_an_end(modules: dict[str, ModuleType]) -> None:
    cells = modules["cells"]
    assert tune(cells, best=1.6e-3) == pytest.approx([2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3])
    assert cells.Study().freeze("aiw")["lrs"] == dict.fromkeys(cells.Study().arms, 1.6e-3)


def test_a_best_below_the_first_lrs_is_found(modules: dict[str, ModuleType]) -> None:
    assert tune(modules["cells"], best=1e-4) == pytest.approx([5e-5, 1e-4, 2e-4, 4e-4, 8e-4])


def test_confirming_seeds_wait_for_the_commit(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, study = modules["cells"], modules["study"]
    tune(cells, best=4e-4)
    monkeypatch.setattr(study, "is_committed", lambda file: False)
    assert list(study.missing(cells.Study(), ["aiw"])) == []
    frozen = json.loads((cells.frozen_file("aiw")).read_text())
    assert frozen["threshold"] == pytest.approx(0.9 * 0.9)
    monkeypatch.setattr(study, "is_committed", lambda file: True)
    found = list(study.missing(cells.Study(), ["aiw"]))
    gated = [cell for cell in found if cell.arm.startswith("gate_")]
    assert sorted({cell.arm for cell in gated}) == ["gate_code", "gate_paper"] and len(gated) == 6
    found = [cell for cell in found if cell not in gated]
    confirming = [cell for cell in found if 100 <= cell.seed < 200]
    assert len(confirming) == 10 * len(cells.Study().arms)
    assert {cell.seed for cell in confirming[: len(cells.Study().arms)]} == {100}
    assert len(found) - len(confirming) == 3 * (4 * 4 + 3)  # the ablations


def test_a_crossing_is_between_evaluations(modules: dict[str, ModuleType]) -> None:
    cells = modules["cells"]
    cell = cells.Cell(task="aiw", arm="grpo", lr=1.0, seed=0)
    leave(cell, [0.2, 0.4, 0.8, 0.8, 0.8])
    found = cells.read(cell.file)
    assert found.reached(0.5) == 256 + 0.25 * 256
    assert found.reached(0.1) == 0 and found.reached(0.81) is None
    assert found.final == pytest.approx(0.8) and not found.broke
    leave(cell, [0.2, 0.4, 0.8, 0.1, 0.1, 0.1])
    assert cells.read(cell.file).broke
    leave(cell, [0.2, 0.4, 0.8], ended="error: collapsed")
    assert cells.read(cell.file).final == 0 and cells.read(cell.file).broke


@pytest.mark.parametrize("content", ["", "{}\n{", "not"])
def test_a_result_that_is_broken_is_named(
    modules: dict[str, ModuleType], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "seed-1.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"seed-1\.jsonl: found .*, expected a line of JSON"):
        modules["cells"].read(file)


def metrics_of(file: Path, num_steps: int) -> None:
    """Train steps with all columns that a run has, and an evaluation every eighth."""
    names = ("reward_mean", "grad_norm", "clip_frac", "ppo_kl", "response_tokens_mean")
    lines: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.123456}]
    for step in range(1, num_steps + 1):
        lines.append({
            "step": step, "num_rollouts": 32 * step, "num_skipped_steps": 0, "num_passes": 4,
            **dict.fromkeys(names, 0.12345 / step), "time/step_s": 1.0 + step % 3 / 10,
            "entropy": 1.0 + math.sin(step) / 10 + (step > 70),
        })  # fmt: skip
        if step % 8 == 0:
            lines.append({"step": step, "eval/accuracy": min(0.9, step / num_steps)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("num_steps", [240, 600, 1000])
def test_a_result_stays_short(
    modules: dict[str, ModuleType], tmp_path: Path, num_steps: int
) -> None:
    """However many steps: all are counted, the gate closes where it would, and the costs are those
    of the whole file, as far as the steps that are kept are like the others."""
    saved, costs, gates = modules["saved"], modules["costs"], modules["gates"]
    metrics_of(tmp_path / "metrics.jsonl", num_steps)
    lines = list(saved.trimmed(tmp_path / "metrics.jsonl"))
    about = {"settings": {}, "ended": "finished", "commit": "0" * 40, "hardware": "2 cores"}
    file = tmp_path / "seed-1.jsonl"
    saved.write(file, about, lines)
    assert file.stat().st_size < saved.LIMIT_BYTES
    found = saved.read(file)
    whole = saved.Outcome(
        about=about, evals=found.evals, train=tuple(x for x in lines if "accuracy" not in x)
    )
    assert len(found.train) == num_steps and len(found.evals) == 1 + num_steps // 8
    assert (len(found.measured) == num_steps) == (num_steps == 240)
    assert [x["entropy"] for x in found.train] == [x["entropy"] for x in whole.train]
    rule = modules["cells"].Study().gate_rules()["code"]
    assert gates.closing_step(rule, found) == gates.closing_step(rule, whole) is not None
    for cost in (costs.passes, costs.seconds):
        for threshold in (0.5, 0.99):
            expected = pytest.approx(cost(whole, threshold), rel=0.02)
            assert cost(found, threshold) == expected


def test_a_result_that_cannot_be_short_is_refused(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    lines = [{"step": step, "entropy": 1.234, "step_s": 1.0} for step in range(3000)]
    with pytest.raises(ValueError, match=r"found 3000 train steps, expected so few"):
        modules["saved"].write(tmp_path / "seed-1.jsonl", {}, lines)
    assert not list(tmp_path.iterdir())


def test_committed_results_are_short(modules: dict[str, ModuleType]) -> None:
    files = list((FOLDER / "results").rglob("*.jsonl"))
    assert len(files) > 80
    assert max(file.stat().st_size for file in files) < modules["saved"].LIMIT_BYTES


def test_result_of_metrics(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "eval/accuracy": 0.25},
        {
            "step": 1,
            "num_rollouts": 128,
            "reward_mean": 0.123456789,
            "entropy": 1,
            "time/step_s": 2,
        },
        {"step": 1, "eval/accuracy": 0.5},
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(modules["saved"].trimmed(metrics)) == [
        {"rollouts": 0, "accuracy": 0.25},
        {"step": 1, "rollouts": 128, "reward": 0.1235, "entropy": 1, "step_s": 2},
        {"rollouts": 128, "accuracy": 0.5},
    ]


def test_a_gated_arm_has_the_rule_and_nothing_else(modules: dict[str, ModuleType]) -> None:
    plan = modules["cells"].Study()
    sfpo, gated = plan.settings_of("sfpo"), plan.settings_of("gate_paper")
    assert gated == {**sfpo, **plan.gate_rules()["paper"]} and gated["sfpo.trigger"] == "two_sided"


def test_arms_change_what_they_say(modules: dict[str, ModuleType]) -> None:
    """A quarter of the batch has four times the steps, and evaluates at the same rollouts."""
    cells, study = modules["cells"], modules["study"]
    cell = cells.Cell(task="aiw", arm="grpo_quarter", lr=1e-3, seed=7)
    assert study.overrides_of(cells.Study(), cell) == {
        "sfpo.num_fast_passes": 0,
        "train.prompts_per_step": 4,
        "train.num_steps": 240,
        "eval.every": 8,
        "train.optimizer.lr": 1e-3,
        "seed": 7,
        "sfpo.entropy_zscore_threshold": 100.0,
    }


def test_no_arm_meets_the_gate(modules: dict[str, ModuleType]) -> None:
    """An arm whose gate closes goes on as GRPO, and would be compared with itself."""
    cells, study = modules["cells"], modules["study"]
    plan = cells.Study()
    for arm in (*plan.arms, *plan.ablation_arms()):
        cell = cells.Cell(task="aiw", arm=arm, lr=1e-3, seed=7)
        words = [f"{k}={json.dumps(v)}" for k, v in study.overrides_of(plan, cell).items()]
        gate = EntropyGate.of(load_config(FOLDER / "aiw.yaml", words).sfpo)
        for step in range(1, 100):
            assert gate.is_open(step)
            gate.observe(1.0 if step < 60 else 10.0)


@pytest.mark.parametrize(
    ("left", "is_result"), [("1\nfinal\n", True), ("1\n", False), ("85\n", False), (None, False)]
)
def test_only_a_collapse_is_a_result(
    modules: dict[str, ModuleType], tmp_path: Path, left: str | None, is_result: bool
) -> None:
    """A run that lost its engines or its machine is run again."""
    (tmp_path / "logs").mkdir()
    if left is not None:
        (tmp_path / "logs/rank_0.exit").write_text(left)
    assert modules["study"].ended_itself(tmp_path) == is_result


@pytest.mark.parametrize("code", [2, 85, 130, -15])
def test_a_command_that_was_ended_leaves_no_result(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    study = modules["study"]
    done = subprocess.CompletedProcess([], code)
    monkeypatch.setattr(study.subprocess, "run", lambda *args, **others: done)
    with pytest.raises(study.Unfinished, match=f"exit code {code}"):
        study.command("train", tmp_path / "config.yaml", [], tmp_path / "log")


def test_sums_are_worked_out(modules: dict[str, ModuleType]) -> None:
    sums = modules["sums"]
    entry = {"question": "q", "metadata": {"expression": "4 - 1 - 7 + 2"}}
    assert sums.worked_solution(entry) == "4-1=3\n3-7=-4\n-4+2=-2\nAnswer: -2"
    slipped = [sums.slipping_solution({**entry, "question": str(number)}) for number in range(1000)]
    right = sum(text == sums.worked_solution(entry) for text in slipped) / len(slipped)
    assert right == pytest.approx((1 - sums.SLIPS) ** 3, abs=0.05)
