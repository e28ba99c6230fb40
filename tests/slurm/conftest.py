"""One Slurm for all tests here, and the run without Slurm that jobs are compared with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import digits
import jobs
import pytest
from lab import SlurmLab, missing

NUM_NODES = 2


def is_required() -> bool:
    """REQUIRE=slurm: a machine without Slurm fails these tests."""
    return "slurm" in os.environ.get("REQUIRE", "").split(",")


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without Slurm one test here stands for all: one skip."""
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    if missing() and not is_required() and mine:
        config.hook.pytest_deselected(items=mine[1:])
        items[:] = [item for item in items if item not in mine[1:]]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Two idle nodes; at the end no daemon and no job is left. REQUIRE=slurm: no skip."""
    if absent := missing():
        reason = f"Slurm is not installed (no {', '.join(absent)}): make slurm-deps"
        if is_required():
            pytest.fail(reason)
        pytest.skip(reason)
    lab = SlurmLab(tmp_path_factory.mktemp("lab"), num_nodes=NUM_NODES)
    # A session that is ended ends its jobs: without slurmctld nobody would.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The run directory of `jobs.write_config`'s run, by `sfpo-megatron train`, no Slurm; beside it
    its rollouts."""
    folder = tmp_path_factory.mktemp("reference")
    rollouts = str(folder / "rollouts.safetensors")
    digits.train(jobs.write_config(folder, model, debug={"save_rollouts": rollouts}))
    return folder / "run"
