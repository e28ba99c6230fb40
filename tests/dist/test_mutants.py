"""The tests can fail: with one part of SFPO turned off, the test that names it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_is_noticed(name: str) -> None:
    """The test passes without the mutant: it is part of the default run."""
    test = MUTANTS[name].noticed_by
    paths = [str(ROOT / "tests" / "dist"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "mutants", test],
        cwd=ROOT,
        env=os.environ | {"SFPO_MUTANT": name, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = f"{result.stdout[-3000:]}\n{result.stderr[-1000:]}"
    assert result.returncode == 1, f"nobody noticed {name}: {told}"  # 1: tests ran, some failed
    assert "AssertionError" in result.stdout, told
