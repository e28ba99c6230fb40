"""Session fixtures of the torchrun tests: reference models and batches, made once; the jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Jobs


@pytest.fixture(scope="session")
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Runs every selected case; `pytest -k` therefore starts only what it asks for."""
    from references import make_references

    directory = tmp_path_factory.mktemp("dist")
    make_references(directory)
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [spec.params.get("case") for spec in callspecs if spec is not None]
    return Jobs([case for case in cases if isinstance(case, Case)], directory)
