"""What the tests submit, and what they look for afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import digits
from lab import SlurmLab

from sfpo_megatron.slurm.render import TEMPLATES

NUM_STEPS = 6
# CPU nodes: the GPUs are fake. As a user would write it for a cluster.
ENV = """
export GLOO_SOCKET_IFNAME=lo
SFPO_EXPECT_GPUS=0
SFPO_PREFLIGHT_RANKS={ranks}
SFPO_MIN_GB_S_IN_NODE=0.001
SFPO_MIN_GB_S_BETWEEN_NODES=0.001
SFPO_RAY_OBJECT_STORE_BYTES=100000000
"""


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """One engine, two data-parallel ranks: one on each node of a job."""
    sections: dict[str, Any] = {
        "parallel": {"tensor": 1, "data": 2},
        "train": {"num_steps": NUM_STEPS},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    return digits.write_config(folder, model, **sections)


def submit(
    lab: SlurmLab, config: Path, *options: str, overrides: tuple[str, ...] = (), ranks: int = 0
) -> str:
    """By the command that users run, on both nodes with one rank each; the job's id."""
    env_file = config.parent / "env.sh"
    env_file.write_text((TEMPLATES / "env.sh").read_text() + ENV.format(ranks=ranks))
    done = lab.run(
        sys.executable, "-m", "sfpo_megatron", "slurm", str(config), *overrides,
        "--nodes=2", "--train-nodes=2", "--time=0:10:00", f"--env={env_file}", *options,
    )  # fmt: skip
    assert done.stdout.startswith("submitted job "), done.stdout
    return done.stdout.split()[2].rstrip(":")


def output(run: Path, job: str) -> str:
    """What the job has written so far."""
    file = run / "slurm" / f"{job}.out"
    return file.read_text(errors="replace") if file.exists() else ""


def processes(job: str) -> dict[int, str]:
    """pid -> command line of every live process that has the job's id in its environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if f"SLURM_JOB_ID={job}".encode() in variables and state not in "ZX":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
        except OSError:
            continue
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without what a clock wrote."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines]


def check(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`sfpo-megatron check`."""
    command = [sys.executable, "-m", "sfpo_megatron", "check", *options, str(config)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
