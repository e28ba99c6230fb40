"""`sfpo-megatron doctor`: versions, devices, and which fallbacks are in use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from sfpo_megatron.host.addresses import gloo_fault, own_address
from sfpo_megatron.host.home import can_be_written
from sfpo_megatron.outputs.environment import DISTRIBUTIONS
from sfpo_megatron.sandbox.isolation import isolation

_GIB = 1024**3


def report() -> str:
    """The whole report, one fact a line."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "machine": _machine(),
        "falls back": _fallbacks(),
    }
    lines = []
    for title, facts in sections.items():
        lines.append(title)
        width = max(len(name) for name in facts)
        lines += [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"torch": f"cannot be imported: {error}"}
    facts = {"torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"}
    if not torch.cuda.is_available():
        if torch.version.cuda:
            facts["torch build"] += ", on a machine without: the CPU build does as well"
        return facts | {"GPUs": "none: gloo, one OpenMP thread a process"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{device.name}, {device.total_memory / _GIB:.0f} GiB"
    return facts


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    facts = {
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": f"{memory:.1f} GiB",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset: the launcher sets 1"),
    }
    home = os.environ.get("HOME", "")
    if not home:
        facts["home"] = "none (HOME is not set): a run finds one of its own"
    elif not can_be_written(home):
        facts["home"] = f"{home}, which cannot be written: caches of a run go elsewhere"
    facts["address"] = gloo_fault() or f"{own_address()}, as ranks on other machines are told"
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        facts["shared memory"] = (
            f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} ({shm})"
        )
    else:
        facts["shared memory"] = "none: the refit goes through a file"
    missing = isolation().missing
    facts["tool python"] = (
        f"programs of a model are not kept from {' and '.join(missing)}"
        if missing
        else "programs of a model have no network, no files and no processes of others"
    )
    return facts


def _fallbacks() -> dict[str, str]:
    """The fallbacks of the trainer on this machine, as `mcore/capabilities.py` decides."""
    try:
        from sfpo_megatron.mcore.capabilities import probe
    except ImportError as error:
        return {"unknown": f"torch cannot be imported: {error}"}
    found = probe()
    spec = {"te": "TransformerEngine", "local": "torch (TransformerEngine cannot be used here)"}
    adam = {
        "te": "TransformerEngine FusedAdam",
        "apex": "Apex FusedAdam",
        "torch": "torch AdamW (neither TransformerEngine nor Apex can be used here)",
    }
    return {
        "layer spec": spec[found.layers],
        "optimizer": adam[found.adam],
        "collectives": "NCCL" if found.cuda else "gloo (no CUDA)",
    }
