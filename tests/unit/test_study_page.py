"""The page of the study in examples/sfpo_vs_grpo: tables, pictures, gates, timing, budget.

Results are made up here, and no run is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made.study_runs import FOLDER, confirm, leave, study_modules, tune

from sfpo_megatron.config.load import load_config


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The study's modules, with results in a folder of the test's own."""
    yield from study_modules(tmp_path, monkeypatch)


@pytest.fixture
def page(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Write the page, and give it back."""
    results, file = modules["results"], tmp_path / "results.md"
    monkeypatch.setattr(results, "PAGE", file)
    monkeypatch.setattr(results, "IMAGES", tmp_path)
    file.write_text("")

    def written() -> str:
        results.write_page(modules["cells"].Study())
        return file.read_text()

    return written


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
    confirm(cells)
    results.write_page(cells.Study())
    page = (tmp_path / "results.md").read_text()
    ratio, to_itself = "2.00 | 2.00 to 2.00 | 2.00 to 2.00", "1.00 (1.00 to 1.00)"
    ended = "0.900 ± 0.000 | 0.000 (0.000 to 0.000) | 0 of 10 | 0123456 |"
    assert f"| sfpo | 0.0004 | 256 | {ratio} | {to_itself} | {ended}" in page
    assert "| 1.00 | 1.00 to 1.00 | 1.00 to 1.00 | 2.00 (2.00 to 2.00) | 0.870" in page  # grpo
    assert "| grpo | 0.0004 | 512 | 1.00 |" in page and (tmp_path / "study-aiw.png").exists()
    twice_as_dear = "2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00)"
    assert f"| sfpo | 4 | {twice_as_dear} | 1,024 | 1,024 | 0123456 |" in page
    assert "runs, which were made at different moments" in page and "all on 2 cores" in page


def test_both_columns_say_which_pairs_are_bounds(
    modules: dict[str, ModuleType], page: Callable[[], str]
) -> None:
    cells = modules["cells"]
    confirm(cells)
    lr = 4e-4
    for arm, seed in (("grpo", 100), ("grpo", 101), ("prepo", 101), ("sfpo", 102), ("prepo", 103)):
        cell = cells.Cell(task="aiw", arm=arm, lr=lr, seed=seed)
        leave(cell, [0.0, 0.2, 0.3, 0.3, 0.3])
    rows = {line.split(" | ")[0]: line for line in page().splitlines() if "(" in line}
    text = page()
    rows = {
        line.split(" | ")[0].lstrip("| "): line.split(" | ")
        for line in text.splitlines()
        if " of 10 | 0123456" in line and "0.0004" in line
    }
    assert rows["prepo"][3].endswith("(1 lower, 1 upper, 1 open)")
    assert rows["prepo"][6].endswith("; 2 lower, 1 upper)")
    assert rows["prepo"][2].endswith(", never in 2")


def test_each_row_says_what_it_was_made_with(
    modules: dict[str, ModuleType], page: Callable[[], str]
) -> None:
    """In every table; the hardware too where it is not one."""
    cells = modules["cells"]
    confirm(cells, commit="fedcba9876-dirty")
    for cell in cells.Study().forking()[:1] + cells.Study().ablating()[:1]:
        leave(cell, [0.0, 0.5], commit="aaaaaaaaaa")
    text = page()
    tables = [part for part in text.split("\n\n") if part.startswith("| ") and "arm" in part]
    tables += [part for part in text.split("\n\n") if part.startswith("| rule")]
    assert len(tables) == 5 and all("| made with |" in part.splitlines()[0] for part in tables)
    assert text.count("| fedcba9-dirty |") == 4  # two tables of SFPO's, two rules that did not run
    assert "| aaaaaaa, fedcba9-dirty |" in text and "| 0.250 | 0.250 | aaaaaaa |" in text
    leave(cells.Study().forking()[0], [0.0, 0.5], hardware="4 cores")
    text = page()
    assert "0123456 on 2 cores" in text and "0123456 on 4 cores" in text
    assert "all on" not in text


def test_ablations_are_mapped_as_far_as_they_have_run(
    modules: dict[str, ModuleType], tmp_path: Path, page: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two of the sixteen places have values, and the others stay blank."""
    cells, pictures = modules["cells"], modules["pictures"]
    confirm(cells)
    assert "ablation" not in page() and not (tmp_path / "study-aiw-ablation.png").exists()
    seen: list[Any] = []
    draw = pictures.heat_maps
    monkeypatch.setattr(
        pictures, "heat_maps", lambda *given: (seen.append(given), draw(*given))[-1]
    )
    for cell in cells.Study().ablating():
        if cell.arm in ("num_fast_passes-1_alpha-0.5", "num_fast_passes-10_alpha-1.0"):
            leave(cell, [0.2, 0.4] if "-10_" in cell.arm else [0.1, 0.3])
    assert "](images/study-aiw-ablation.png)" in page()
    assert (tmp_path / "study-aiw-ablation.png").read_bytes().startswith(b"\x89PNG")
    [(panels, rows, columns, _)] = seen
    assert rows == ("num_fast_passes", [1, 3, 5, 10]) and columns == ("alpha", [0.1, 0.5, 0.8, 1.0])
    expected = {(1, 0.5): pytest.approx(0.2), (10, 1.0): pytest.approx(0.3)}
    assert panels["mean accuracy"] == expected


def test_a_place_without_a_value_is_blank(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """White pixels where nothing has run; a map of one value is drawn too."""
    from matplotlib.image import imread

    file = tmp_path / "map.png"
    modules["pictures"].heat_maps({"a": {(1, 2): 0.5}}, ("K", [1, 3]), ("alpha", [2, 4]), file)
    picture = imread(file)[:, :, :3]
    inside = picture[100:-100, 100:-300]
    white = (inside == 1).all(axis=2).mean()
    assert 0.6 < white < 0.9  # three of four places


def test_cost_of_a_rollout_is_timed_in_turns_where_it_was(
    modules: dict[str, ModuleType], page: Callable[[], str]
) -> None:
    """Three times GRPO's in each of two rounds, although the rounds were not alike."""
    cells, timing = modules["cells"], modules["timing"]
    confirm(cells)
    assert timing.of("aiw") is None
    seconds = {arm: [0.01, 0.02] for arm in cells.Study().arms} | {"sfpo": [0.03, 0.06]}
    about = {"num_steps": 16, "commit": "fedcba9876", "hardware": "8 cores"}
    cells.timing_file("aiw").write_text(json.dumps({**about, "seconds_a_rollout": seconds}))
    text = page()
    assert "| sfpo | 4 | 3.00 (3.00 to 3.00) | 0.67 (0.67 to 0.67) |" in text
    assert "from 2 rounds of runs of 16 train steps" in text and "commit fedcba9, 8 cores" in text
    assert "different moments" not in text


def test_arms_are_timed_in_turns(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round begins with another arm; the first step of a run does not count, nor does the
    evaluation before it. The commands are not run here: metrics are left in their place."""
    cells, study = modules["cells"], modules["study"]
    confirm(cells)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "warm_start", lambda *given: tmp_path / "model")
    begun = []

    def trained(name: str, config: Path, overrides: list[str], log: Path) -> int:
        changed = load_config(config, overrides)
        assert changed.train.num_steps == 16 and not changed.eval.every
        begun.append(log.parent.name)
        log.parent.mkdir(parents=True)
        lines: list[dict[str, float]] = [{"step": 0, "eval/accuracy": 0.25}]
        lines += [
            {"step": step, "num_rollouts": 128 * step, "time/step_s": 9.0 if step == 1 else 1.28}
            for step in (1, 2, 3)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (log.parent / "metrics.jsonl").write_text(text)
        return 0

    monkeypatch.setattr(study, "command", trained)
    study.time_arms(cells.Study(), "aiw", 2)
    arms = list(cells.Study().arms)
    rest = [*arms[1:], arms[0]]
    assert begun == [*(f"0-{arm}" for arm in arms), *(f"1-{arm}" for arm in rest)]
    found = modules["timing"].of("aiw")
    assert found.seconds == {arm: pytest.approx([0.01, 0.01]) for arm in arms}


def test_timing_waits_for_a_machine_of_its_own(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    study = modules["study"]
    monkeypatch.setattr(study.os, "getloadavg", lambda: (1.7, 0.0, 0.0))
    assert study.time_all(["aiw"], 1) == 2
    assert "found a load of 1.7, expected less than 0.5" in capsys.readouterr().err


def test_the_plan_is_within_its_budget(modules: dict[str, ModuleType]) -> None:
    """With what aiw's committed runs have taken; 150 steps instead of 60 would not be."""
    cells, budget = modules["cells"], modules["budget"]
    cells.RESULTS = FOLDER / "results"
    study = cells.Study()
    hours = sum(budget.hours_of(study, task) for task in study.tasks)
    assert hours <= study.settings["budget"]["hours"] < hours * 150 / 60
    assert budget.minutes_a_run(study, "aiw")[1]
    for task in study.tasks.values():
        assert load_config(FOLDER / task["config"]).train.num_steps == 60


def test_budget_counts_what_is_planned(
    modules: dict[str, ModuleType], page: Callable[[], str]
) -> None:
    """A run of these takes a minute; 5 arms, 3 lrs with 2 seeds, 10 confirming seeds, 6 forks and
    19 ablations of 3 seeds."""
    confirm(modules["cells"])
    planned = 5 * 3 * 2 + 5 * 10 + 6 + 19 * 3
    hours = f"{80 / 120:.1f} | {planned / 120:.1f} |"
    assert f"| aiw | 80 of {planned} | 1.00, 2.00 | 1.0 | {hours}" in page()


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
        "| code | 4 of 10 | 35 | 2 | 0.500 | 0.900 | 0123456 |",
        "| paper | 4 of 10 | 35 | - | - | - | 0123456 |",
        "| patient | 4 of 10 | 38 | - | - | - | 0123456 |",
    ]
