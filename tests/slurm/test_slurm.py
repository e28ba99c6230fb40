"""The Slurm launch path; without Slurm on this machine: one skip that names it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("sbatch") is None, reason="Slurm is not installed (make slurm-deps)"
)


def test_slurm_answers() -> None:
    """The client is there and runs. Job scripts come with the Slurm part of the project."""
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=30)
    assert version.returncode == 0, version.stderr
    assert version.stdout.startswith("slurm"), version.stdout
