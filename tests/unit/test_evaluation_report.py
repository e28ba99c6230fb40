"""results.json and the tables: every figure of every source, and models side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sfpo_megatron.evaluation import report
from sfpo_megatron.evaluation.records import Record


def records(source: str, *rows: tuple[bool, ...]) -> dict[str, list[Record]]:
    return {
        f"eval.{source}/{number}": [
            {
                "problem": f"eval.{source}/{number}",
                "source": source,
                "sample": sample,
                "correct": correct,
                "answer": "a" if correct else "b",
                "num_tokens": 10,
                "truncated": not correct,
            }
            for sample, correct in enumerate(row)
        ]
        for number, row in enumerate(rows)
    }


T, F = True, False
ONE = records("x", (T, T), (T, F), (F, F), (T, T)) | records("y", (F, F), (F, T))
OTHER = records("x", (T, T), (F, F), (F, F), (T, T)) | records("y", (F, F), (F, F))


def test_sources_all_of_them_and_their_average() -> None:
    found = report.results({"m": ONE})["models"]["m"]
    assert found["x"]["accuracy"] == 5 / 8 and found["y"]["accuracy"] == 1 / 4
    assert found["all"]["accuracy"] == 6 / 12 and found["all"]["num_problems"] == 6
    assert found["average"]["accuracy"] == (5 / 8 + 1 / 4) / 2
    assert found["average"]["stderr"] == pytest.approx(
        math.hypot(found["x"]["stderr"], found["y"]["stderr"]) / 2
    )
    assert found["x"]["pass_at"] == {1: 5 / 8, 2: 3 / 4}
    assert found["x"]["truncated"] == 3 / 8


def test_a_source_that_is_called_as_all_of_them_keeps_its_figures() -> None:
    """A file all.jsonl beside others."""
    problems = records("all", (T, T)) | records("x", (F, F), (T, F)) | records("average", (F, F))
    found = report.results({"a": problems, "b": problems})
    assert found["models"]["a"]["all"]["num_problems"] == 4
    assert found["models"]["a"]["all#0"]["accuracy"] == 1.0
    assert found["models"]["a"]["average"]["accuracy"] == pytest.approx((1 + 1 / 4) / 3)
    assert found["models"]["a"]["average#0"]["num_problems"] == 1
    assert list(found["differences"]["b"]) == ["all#0", "x", "average#0", "all"]
    assert list(report.results({"m": records("all", (T, T))})["models"]["m"]) == ["all"]


def test_one_source_is_not_said_twice() -> None:
    found = report.results({"m": records("x", (T, F))})
    assert list(found["models"]["m"]) == ["x"] and found["differences"] == {}


def test_models_are_compared_with_the_first() -> None:
    found = report.results({"base": OTHER, "ours": ONE})["differences"]
    assert list(found) == ["ours"] and list(found["ours"]) == ["x", "y", "all"]
    assert found["ours"]["all"]["mean"] == pytest.approx(2 * 0.5 / 6)
    text = report.table(report.results({"base": OTHER, "ours": ONE}))
    assert "ours less base" in text and "+16.7 ± 10.5" in text


def test_the_files(tmp_path: Path) -> None:
    found = report.results({"m": records("x", (T, F))})
    report.write(tmp_path, found)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["models"]["m"]["x"]["accuracy"] == 0.5
    assert read["models"]["m"]["x"]["stderr"] is None  # of one problem: JSON has no NaN
    assert read["models"]["m"]["x"]["pass_at"] == {"1": 0.5, "2": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    assert "| x | 1 | 50.0 ± ? | 50.0 | 10 | 50.0 |" in (tmp_path / "results.md").read_text()


def test_the_table_is_aligned() -> None:
    lines = report.table(report.results({"model": ONE})).splitlines()
    assert lines[0] == "model"
    assert lines[1].split("  ")[-1].strip() == "cut off"
    assert len({len(line) for line in lines[1:5]}) == 1
    assert any(line.startswith("average") for line in lines)


def test_a_bar_in_a_name_is_no_column() -> None:
    """A source is called as its file is."""
    text = report.markdown(report.results({"m": records("a|b", (T, T), (T, F))}))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| a\\|b | 2 |")
    first, second = rows[:3], rows[3:]
    for table in (first, second):
        assert len({row.replace("\\|", "").count("|") for row in table}) == 1
