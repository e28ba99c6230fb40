"""Looks at every node of a job before anything heavy starts, and names the one that is wrong.

Run by srun, one task a node, with the nodes' names as arguments. Each leaves a report in the shared
folder; the first node's task waits for all, which is the test of the shared file system, and
compares. Takes a second: nothing is imported that a node may have broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import sfpo_megatron
from sfpo_megatron.host.addresses import gloo_fault, is_loopback, own_address
from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.outputs.starts import DISTRIBUTIONS, versions

_WAIT_S = 300.0  # a container's image is unpacked at another pace on each node
_MAX_SKEW_S = 30.0
_MIN_SHM_BYTES = 1 << 30


class Report(TypedDict):
    """What a node is like."""

    gpus: list[str]
    cores: int
    """Number of cores that a step of the job may use."""
    shm_bytes: int
    clock: float
    address: str
    """The one that gloo binds to (`addresses.choose_gloo_interface`)."""
    gloo_fault: str | None
    """Why it cannot."""
    same: dict[str, str]
    """Versions, which have to be the same on all nodes."""


def report() -> Report:
    """What this node is like."""
    head, installed = os.environ.get("HEAD_ADDRESS"), versions()
    return {
        "gpus": _gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "shm_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "clock": time.time(),
        "address": own_address(peer=head),
        "gloo_fault": gloo_fault(peer=head),
        "same": {
            "python": platform.python_version(),
            "sfpo-megatron": sfpo_megatron.__version__,
            **{name: installed.get(name, "none") for name in DISTRIBUTIONS},
        },
    }


def _gpus() -> list[str]:
    """One entry a GPU: its name and driver, as nvidia-smi gives them."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:  # a GPU that has fallen off the bus
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def faults(reports: Mapping[str, Report], *, num_gpus: int) -> list[str]:
    """One line for everything that is wrong, with the node's name; empty when all is well."""
    found = []
    for node, one in reports.items():
        if len(one["gpus"]) != num_gpus:
            found.append(f"{node}: found {len(one['gpus'])} GPUs, expected {num_gpus}")
        if one["cores"] < num_gpus:
            found.append(
                f"{node}: found {one['cores']} usable cores, expected one for each of its "
                f"{num_gpus} GPUs or more; ask for them (--sbatch=--cpus-per-task=N)"
            )
        if one["shm_bytes"] < _MIN_SHM_BYTES:
            mib = one["shm_bytes"] >> 20
            found.append(f"{node}: found {mib} MiB free in /dev/shm, expected 1024 or more")
        if one["gloo_fault"] is not None:
            found.append(f"{node}: {one['gloo_fault']}")
        elif num_gpus and len(reports) > 1 and is_loopback(one["address"]):
            found.append(
                f"{node}: found no address of its own but {one['address']}, expected one that "
                "other nodes reach; set GLOO_SOCKET_IFNAME to its network interface"
            )
    kinds = {node: ", ".join(sorted(set(one["gpus"]))) for node, one in reports.items()}
    found += _odd_ones("GPU and driver", kinds)
    for name in next(iter(reports.values()))["same"]:
        versions = {node: one["same"].get(name, "none") for node, one in reports.items()}
        found += _odd_ones(name, versions)
    clocks = sorted((one["clock"], node) for node, one in reports.items())
    middle = clocks[len(clocks) // 2][0]
    found += [
        f"{node}: its clock is {clock - middle:+.0f} s off the others'"
        for clock, node in clocks
        if abs(clock - middle) > _MAX_SKEW_S
    ]
    return found


def _odd_ones(what: str, values: Mapping[str, str]) -> list[str]:
    usual = Counter(values.values()).most_common(1)[0][0]
    return [
        f"{node}: found {what} {value}, expected {usual} as on most nodes"
        for node, value in values.items()
        if value != usual
    ]


def collect(folder: Path, nodes: Sequence[str], wait_s: float) -> dict[str, Report]:
    """The reports that have come within `wait_s`, by node."""
    deadline = time.monotonic() + wait_s
    found: dict[str, Report] = {}
    while len(found) < len(nodes) and time.monotonic() < deadline:
        os.listdir(folder)  # NFS shows a new file once its folder is read again
        for number, node in enumerate(nodes):
            file = folder / f"preflight-{number}.json"
            if node not in found and file.exists():
                found[node] = json.loads(file.read_text(encoding="utf-8"))
        time.sleep(0.1)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 3 with a line for each fault."""
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="a folder that every node sees")
    parser.add_argument("--gpus", type=int, required=True, help="expected on each node")
    parser.add_argument("nodes", nargs="+", help="names, in the order of SLURM_NODEID")
    options = parser.parse_args(arguments)
    number = int(os.environ["SLURM_NODEID"])
    own = options.dir / f"preflight-{number}.json"
    with replacing(own) as aside:
        aside.write_text(json.dumps(report(), indent=1), encoding="utf-8")
    if number != 0:
        return 0
    reports = collect(options.dir, options.nodes, _WAIT_S)
    lines = [
        f"{node}: no report in {options.dir} after {_WAIT_S:g} s; does it see that folder, and "
        "does Python start there?"
        for node in options.nodes
        if node not in reports
    ]
    lines += faults(reports, num_gpus=options.gpus)
    for line in lines:
        print(f"preflight: {line}; leave it out with sbatch --exclude=NODE", file=sys.stderr)
    return 3 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
