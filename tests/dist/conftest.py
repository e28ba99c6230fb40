"""Session fixtures of the torchrun tests: reference models and batches, made once; the jobs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Jobs
from references import ALL_MODELS

MATRIX_SIZE = 100
"""Cases with figures from which on a run was that of the whole matrix."""

NUM_FAMILIES = len(ALL_MODELS)
"""Cases of test_convert.py from which on a run was that of all families."""


@pytest.fixture(scope="session")
def jobs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    """Runs every selected case; `pytest -k` therefore starts only what it asks for. A run of all
    cases (`make test-full`) keeps their figures."""
    from references import make_references

    directory = tmp_path_factory.mktemp("dist")
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    found = [spec.params.get("case") for spec in callspecs if spec is not None]
    cases = [case for case in found if isinstance(case, Case)]
    make_references(
        directory,
        plain=[
            (
                *(case.arguments[name] for name in ("model", "k", "alpha", "eps")),
                case.arguments.get("predicted", False),
            )
            for case in cases
            if "eps" in case.arguments
        ],
    )
    jobs = Jobs(cases, directory)
    yield jobs
    from benchmarks.common import provenance

    families = {name: f for name, f in jobs.figures.items() if name.startswith("test_convert:")}
    if len(families) == NUM_FAMILIES:
        rows = {name.partition("[")[2].rstrip("]"): figures for name, figures in families.items()}
        provenance.write_cpu("converters", {"logits_against_transformers": rows})
    if len(jobs.figures) >= MATRIX_SIZE:
        provenance.write_cpu("sfpo_exactness", {"cases": jobs.figures})
