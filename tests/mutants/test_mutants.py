"""The tests can fail: each fault of table.toml is noticed, in a copy of the tree."""

from __future__ import annotations

import pytest
from mutants import noticed_by, read_table

TABLE = read_table()


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.survives])
def test_is_noticed(name: str) -> None:
    """First by the test that the row names."""
    assert noticed_by(TABLE[name]), f"{name}: no test of the default run notices it; write one"
