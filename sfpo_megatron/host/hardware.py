"""Links, pages and limits of this machine in words, for `doctor`. Standard library only.

`root` stands in for / wherever files are read.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections import Counter
from pathlib import Path

_ROOT = Path("/")
_SMI_S = 20.0
_UNKNOWN = "unknown here"
_LIMITS = {
    "locked memory": (resource.RLIMIT_MEMLOCK, 10),
    "open files": (resource.RLIMIT_NOFILE, 0),
    "processes": (resource.RLIMIT_NPROC, 0),
}
"""What -> which limit, and by how many bits it is shifted: KiB for memory, as in `ulimit -l`."""


def infiniband(root: Path = _ROOT) -> str:
    """The ports of the RDMA adapters: how many, their kind, rate and state."""
    ports = sorted((root / "sys/class/infiniband").glob("*/ports/*"))
    if not ports:
        return "none: NCCL goes over sockets between nodes"
    kinds = Counter(
        f"{_line(port / 'link_layer')} {_line(port / 'rate')}, "
        f"{_line(port / 'state').rpartition(':')[2].strip()}"
        for port in ports
    )
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def huge_pages(root: Path = _ROOT) -> str:
    """The transparent ones' mode, and how many are set aside."""
    mode = re.search(r"\[(\w+)\]", _line(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    reserved = _line(root / "proc/sys/vm/nr_hugepages")
    return f"transparent: {mode[1] if mode else _UNKNOWN}; set aside: {reserved}"


def limits() -> str:
    """This process's own: the runs that are started from here have them too."""
    found = []
    for what, (limit, bits) in _LIMITS.items():
        soft, _ = resource.getrlimit(limit)
        said = "unlimited" if soft == resource.RLIM_INFINITY else str(soft >> bits)
        found.append(f"{what} {said}{' KiB' if bits and said.isdecimal() else ''}")
    return ", ".join(found)


def nvlinks(smi: str = "nvidia-smi") -> str:
    """Active NVLinks of each GPU, by the driver's own tool."""
    if shutil.which(smi) is None:
        return f"{_UNKNOWN}: {smi} is not on PATH"
    try:
        done = subprocess.run([smi, "nvlink", "-s"], capture_output=True, text=True, timeout=_SMI_S)
    except (OSError, subprocess.TimeoutExpired):  # a file for another machine, as an image has
        return f"{_UNKNOWN}: {smi} does not answer"
    if done.returncode:
        return f"{_UNKNOWN}: {smi} ended with {done.returncode}"
    active: list[int] = []
    rates: list[float] = []
    for line in done.stdout.splitlines():
        if line.startswith("GPU "):
            active.append(0)
        elif active and (rate := re.search(r"Link \d+: ([\d.]+) GB/s", line)):
            active[-1] += 1
            rates.append(float(rate[1]))
    if not rates:
        return "none: GPUs reach one another over PCIe"
    kinds = Counter(active)
    counts = "; ".join(f"{num} on {gpus} GPUs" for num, gpus in sorted(kinds.items()))
    return f"{counts}, {min(rates):g} GB/s each" if min(rates) == max(rates) else counts


def _line(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return _UNKNOWN
