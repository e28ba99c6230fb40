"""The table of faults (tests/mutants/) does not rot: each row is of the code as it is now.

Not exercised: whether a fault is noticed, which `make test-full` tries.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "mutants"))

from mutants import ROOT, Mutant, read_table, record  # noqa: E402

ROWS = list(read_table().values())


def test_every_fault_can_be_made_once() -> None:
    for row in ROWS:
        text = (ROOT / row.file).read_text(encoding="utf-8")
        assert text.count(row.before) == 1, f"{row.name}: {row.file} has other lines now"
        faulty = text.replace(row.before, row.after)
        assert faulty != text, row.name
        if row.file.endswith(".py"):
            ast.parse(faulty)


def test_every_row_names_tests_that_exist() -> None:
    for row in ROWS:
        assert row.tests and bool(row.noticed_by) != bool(row.survives), row.name
        for tests in (*row.tests, *filter(None, [row.noticed_by])):
            file, _, function = tests.partition("::")
            text = (TESTS / file).read_text(encoding="utf-8")
            assert f"def {function.partition('[')[0]}" in text, f"{row.name}: {tests}"


def test_every_row_names_a_case_that_exists(request: pytest.FixtureRequest) -> None:
    """Asked of the files that this pytest has collected as wholes."""
    chosen = request.config.option
    if chosen.keyword or any("::" in name for name in chosen.file_or_dir):
        pytest.skip("only some tests of a file are collected")
    cases = {item.nodeid.removeprefix("tests/") for item in request.session.items}
    files = {case.partition("::")[0] for case in cases}
    for row in ROWS:
        if row.noticed_by.partition("::")[0] in files:
            assert row.noticed_by in cases, f"{row.name}: {row.noticed_by}"


def test_few_survive() -> None:
    assert sum(bool(row.survives) for row in ROWS) <= 2
    assert len({(row.file, row.before, row.after) for row in ROWS}) == len(ROWS) >= 40


def test_a_fault_is_made_in_the_copy_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    row = Mutant(name="less", file="a.py", before="a < b", after="a <= b", tests=())
    file.write_text("if a < b:\n    a = b\n")
    row.apply(tmp_path)
    assert file.read_text() == "if a <= b:\n    a = b\n"
    with pytest.raises(ValueError, match=r"less: found 'a < b' 0 times in a\.py"):
        row.apply(tmp_path)


def test_what_notices_a_fault_is_written_into_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.toml"
    row = "[[mutant]]\nname = {0!r}\nfile = 'a.py'\nbefore = {0!r}\nafter = ''\ntests = ['unit']\n"
    table.write_text("\n".join(row.format(name).replace("'", '"') for name in ("one", "two")))
    monkeypatch.setattr("mutants.TABLE", table)
    for found in ("unit/test_a.py::test_it[x y]", "unit/test_a.py::test_it"):
        record("one", found)
        assert [row.noticed_by for row in read_table().values()] == [found, ""]
