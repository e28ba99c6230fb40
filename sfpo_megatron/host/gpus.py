"""GPUs as NVIDIA's driver shows them and as CUDA names them: standard library, no CUDA is started.

`root` stands in for / wherever files are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
GPUS_PER_NODE = 8
"""GPUs of a node that nothing else is known of."""
_ROOT = Path("/")
_VERSION = re.compile(r"\b\d{3,}\.\d+(?:\.\d+)?\b")
_OLDEST_DRIVER = {"12": 525, "13": 580}
"""The first driver for each major version of CUDA (CUDA's compatibility guide)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Driver:
    """The driver that the kernel has loaded."""

    version: str
    num_gpus: int
    """Number of GPUs whose device files are here: a container sees the driver, but not these."""


def driver(root: Path = _ROOT) -> Driver | None:
    """The driver; None where it is not loaded."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    version = _VERSION.search(text)
    gpus = [file for file in (root / "dev").glob("nvidia*") if file.name[6:].isdigit()]
    return Driver(version=version[0] if version else "unknown", num_gpus=len(gpus))


def visible_devices(
    num_gpus: int | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Names of the GPUs that a process with `environ` has, in its own order, as CUDA reads
    CUDA_VISIBLE_DEVICES: indices, or UUIDs (GPU-...), or parts of a GPU (MIG-...). The first that
    there is not ends the list, one that is twice in it makes it empty. `num_gpus`: of the machine;
    None holds no index to it.
    """
    listed = environ.get(VISIBLE)
    if listed is None:
        return tuple(map(str, range(num_gpus or 0)))
    names = [name.strip() for name in listed.split(",")]
    kind = names[0][:4] if names[0][:4] in ("GPU-", "MIG-") else ""
    found: list[str] = []
    for name in names:
        if kind:
            if not name.startswith(kind):
                break
        elif not name.isdecimal() or (num_gpus is not None and int(name) >= num_gpus):
            break
        name = name if kind else str(int(name))
        if name in found:
            return ()
        found.append(name)
    return tuple(found)


def own_device(num_visible: int, environ: Mapping[str, str] = os.environ) -> int:
    """Which of its visible devices a rank takes: torchrun gives every rank of a machine all of
    them. ValueError where there is none for it."""
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    if local_rank < num_visible:
        return local_rank
    given = f"{VISIBLE}={environ[VISIBLE]}" if VISIBLE in environ else f"{VISIBLE} is not set"
    raise ValueError(
        f"LOCAL_RANK: found {local_rank} where torch has {num_visible} devices ({given}), expected "
        "one for each rank of the machine; start fewer ranks, or give each of them all devices "
        "(srun --gpu-bind=none). Of several MIG instances CUDA gives a process the first alone"
    )


def devices_of_own_node(
    num_counted: int, environ: Mapping[str, str] = os.environ, root: Path = _ROOT
) -> tuple[str, ...]:
    """Names of the GPUs of a Ray node that this process has started. Ray counts them only: the
    smaller of what NVML shows and the length of CUDA_VISIBLE_DEVICES, whatever stands in it."""
    if num_counted == 0:
        return ()
    if VISIBLE not in environ:
        return tuple(map(str, range(num_counted)))
    found = driver(root)
    return visible_devices(found.num_gpus if found else None, environ)


def unusable(
    found: Driver | None,
    *,
    torch_version: str,
    torch_cuda: str | None,
    why: str,
    environ: Mapping[str, str] = os.environ,
) -> str | None:
    """What keeps torch from a GPU that is here and not hidden, as `found ..., expected ...; fix`;
    None where there is none. To be asked where torch has no device. `torch_cuda`: the CUDA that it
    was built for, None for a CPU build; `why`: its own words."""
    if found is None or not visible_devices(found.num_gpus, environ):
        return None
    here = f"driver {found.version} with {found.num_gpus} GPU{'s' * (found.num_gpus != 1)}"
    anyway = f"where CPU is meant, set {VISIBLE}= (to nothing)"
    if torch_cuda is None:
        return (
            f"found {here} beside torch {torch_version}, a CPU build, expected one for CUDA; "
            f"install the set for GPUs (docs/gpu.md); {anyway}"
        )
    needed = _OLDEST_DRIVER.get(torch_cuda.partition(".")[0])
    major = found.version.partition(".")[0]
    if needed is not None and major.isdecimal() and int(major) < needed:
        return (
            f"found {here}, expected {needed} or newer, which CUDA {torch_cuda} of torch "
            f"{torch_version} needs; update the driver, or install NVIDIA's package "
            f"cuda-compat-{torch_cuda.replace('.', '-')} and put it on LD_LIBRARY_PATH; {anyway}"
        )
    return f"found {here} that torch {torch_version} cannot use ({why}), expected CUDA; {anyway}"
