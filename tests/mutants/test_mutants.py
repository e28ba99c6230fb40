"""The tests can fail: each fault of table.toml is noticed, in a copy of the tree."""

from __future__ import annotations

import subprocess

import pytest
from mutants import ROOT, noticed_by, read_table

TABLE = read_table()


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.survives])
def test_is_noticed(name: str) -> None:
    """First by the test that the row names. What was noticed at this commit is not tried again, as
    `make test-full` does with files."""
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True)
    passed = ROOT / ".cache/test-full" / commit.stdout.strip() / "tests/mutants" / name
    if passed.exists():
        return
    assert noticed_by(TABLE[name]), f"{name}: no test of the default run notices it; write one"
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()
