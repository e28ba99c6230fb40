"""Provenance of a figure: commit, versions, hardware; and its file, for tools/verified.py."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.outputs.starts import commit, machine, versions

ROOT = Path(__file__).resolve().parents[2]


def hardware(device: torch.device) -> str:
    """What `device` is, in words."""
    return f"1 x {torch.cuda.get_device_name(device)}" if device.type == "cuda" else machine()


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
    """`content` with its provenance, said on the screen; the file is whole at any time. `features`:
    keys of tools/verified.py that this run shows."""
    _save(file, content, device=device, features=features)
    print(f"\nwritten: {file}")


def keep(file: Path, content: dict[str, Any], *, device: torch.device) -> None:
    """What there is of a run that goes on, for one that is cut off: it shows no feature yet."""
    _save(file, content, device=device, features=())


def _save(
    file: Path, content: dict[str, Any], *, device: torch.device, features: Sequence[str]
) -> None:
    head = {
        "features": list(features),
        "device": device.type,
        "hardware": hardware(device),
        "commit": commit(),
        # torch's own word: it names the build (+cpu, +cu130), which its metadata may leave out.
        "versions": {"python": python_version(), **versions(), "torch": torch.__version__},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        aside.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")
