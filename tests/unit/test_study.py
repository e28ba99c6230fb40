"""The study of examples/sfpo_vs_grpo: which cell comes next, what a run came to, and the page.

Results are made up here; that a cell really trains is left to the study itself.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sfpo_megatron.config.load import load_config
from sfpo_megatron.gate import EntropyGate

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/sfpo_vs_grpo"
NAMES = ("cells", "gates", "pairs", "results", "study", "sums", "tables")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The study's modules, with results in a folder of the test's own."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    found = {name: importlib.import_module(name) for name in NAMES}
    monkeypatch.setattr(found["cells"], "RESULTS", tmp_path)
    yield found
    for name in NAMES:
        sys.modules.pop(name, None)


def leave(
    cell: Any,
    accuracies: list[float],
    *,
    ended: str = "finished",
    rise: int = 1000,
    step_s: float = 1.0,
) -> None:
    """The result of a run with 128 rollouts a step and an evaluation every second step, whose
    entropy is 1 before step `rise` and then 2."""
    lines: list[dict[str, Any]] = [
        {
            "settings": {"sfpo.num_fast_passes": 0},
            "ended": ended,
            "commit": "0123456789",
            "hardware": "2 cores",
        },
        {"rollouts": 0, "accuracy": accuracies[0]},
    ]
    for index, accuracy in enumerate(accuracies[1:]):
        for step in (2 * index + 1, 2 * index + 2):
            line = {"step": step, "rollouts": 128 * step, "tokens": 4.0, "passes": 4}
            lines.append({**line, "step_s": step_s, "entropy": 2.0 if step >= rise else 1.0})
        lines.append({"rollouts": 256 * (index + 1), "accuracy": accuracy})
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    cell.file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def tune(cells: ModuleType, *, best: float) -> list[float]:
    """Run the tuning of all arms of aiw on made-up scores with their best at `best`; every lr that
    was tried."""
    tried = set()
    while missing := cells.Study().tuning("aiw"):
        for cell in missing:
            score = 0.9 - 0.1 * abs(math.log2(cell.lr / best))
            leave(cell, [0.1, score, score, score])
            tried.add(cell.lr)
    return sorted(tried)


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


def test_ratio_of_pairs(modules: dict[str, ModuleType]) -> None:
    """Against values worked out by hand: t of 2 degrees of freedom is 4.3027."""
    pairs = modules["pairs"]
    found = pairs.paired_ratio([100.0, 200.0, 400.0], [100.0, 100.0, 100.0], budget=1000)
    assert found.value == pytest.approx(2.0)
    half = 4.302653 * math.log(2) / math.sqrt(3)
    expected = (2 * math.exp(-half), 2 * math.exp(half))
    assert found.t_interval == pytest.approx(expected, rel=1e-5)
    assert 1 <= found.bootstrap[0] < 2 < found.bootstrap[1] <= 4
    bounded = pairs.paired_ratio([None, 200.0], [100.0, 100.0], budget=800)
    assert bounded.value == pytest.approx(4.0) and bounded.num_bounds == 1
    assert pairs.t_quantile(9) == pytest.approx(2.262157, abs=1e-6)
    for costs in ([100.0, 0.0], [0.0, 100.0]):
        with pytest.raises(ValueError, match=r"pair \d: found the costs .*, expected some above 0"):
            pairs.paired_ratio(costs, [100.0, 100.0], budget=800)


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
    assert list(modules["cells"].trimmed(metrics)) == [
        {"rollouts": 0, "accuracy": 0.25},
        {"step": 1, "rollouts": 128, "reward": 0.1235, "entropy": 1, "step_s": 2},
        {"rollouts": 128, "accuracy": 0.5},
    ]


def test_page(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the rollouts to the threshold in all pairs: a ratio of 2 with an interval of 2."""
    cells, results = modules["cells"], modules["results"]
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(results, "IMAGES", tmp_path)
    (tmp_path / "results.md").write_text(f"# What was found\n{results.MARK}what was there before")
    results.write_page(cells.Study())
    page = (tmp_path / "results.md").read_text()
    assert "# What was found" in page and "was there" not in page and page.count("No run yet.") == 3
    tune(cells, best=4e-4)
    frozen = cells.Study().freeze("aiw")
    cells.frozen_file("aiw").write_text(json.dumps(frozen))
    for cell in cells.Study().confirming("aiw"):
        if cell.arm == "sfpo":
            leave(cell, [0.0, 0.81, 0.9, 0.9, 0.9], step_s=2.0)
        else:
            leave(cell, [0.0, 0.405, 0.81, 0.9, 0.9])
    results.write_page(cells.Study())
    page = (tmp_path / "results.md").read_text()
    ratio, twice_as_dear = "2.00 | 2.00 to 2.00 | 2.00 to 2.00", "0.900 ± 0.000 | 4 | 2.00 | 1.00"
    to_itself = "1.00 (1.00 to 1.00)"
    assert f"| sfpo | 0.0004 | 256 | {ratio} | {to_itself} | {twice_as_dear} |" in page
    assert "| 1.00 | 1.00 to 1.00 | 1.00 to 1.00 | 2.00 (2.00 to 2.00) | 0.870" in page  # grpo
    assert "| grpo | 0.0004 | 512 | 1.00 |" in page and (tmp_path / "study-aiw.png").exists()


def test_gates_on_what_was_logged(modules: dict[str, ModuleType]) -> None:
    """Entropy doubles at step 34: a rule that sees it at once closes at 35, one that waits for four
    such steps at 38. Where it was on, the fork's accuracy stands beside that of its own seed."""
    cells, gates = modules["cells"], modules["gates"]
    tune(cells, best=4e-4)
    cells.frozen_file("aiw").write_text(json.dumps(cells.Study().freeze("aiw")))
    assert list(gates.told(cells.Study(), "aiw")) == []
    for cell in cells.Study().confirming("aiw"):
        leave(cell, [0.0] + [0.9] * 30, rise=34 if cell.seed < 104 else 1000)
    for cell in cells.Study().forking():
        if cell.arm == "gate_code" and cell.seed < 102:
            leave(cell, [0.0] + [0.5] * 30)
    _, _, _, *rows, _ = gates.told(cells.Study(), "aiw")
    assert rows == [
        "| code | 4 of 10 | 35 | 2 | 0.500 | 0.900 |",
        "| paper | 4 of 10 | 35 | - | - | - |",
        "| patient | 4 of 10 | 38 | - | - | - |",
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
