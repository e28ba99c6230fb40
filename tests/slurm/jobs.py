"""What the tests submit, and what they look for afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import digits
from lab import SlurmLab
from made.same_run import lines
from made.waiting import wait_for

from sfpo_megatron.slurm.render import TEMPLATES

NUM_STEPS = 6
# CPU nodes: the GPUs are fake. As a user would write it for a cluster.
ENV = """
export GLOO_SOCKET_IFNAME=lo
SFPO_EXPECT_GPUS=0
SFPO_RAY_OBJECT_STORE_BYTES=100000000
"""


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """One engine, two data-parallel ranks: one on each node of a job."""
    sections: dict[str, Any] = {
        "parallel": {"tensor": 1, "data": 2},
        "train": {"num_steps": NUM_STEPS},
        "rollout": {"reproducible": True},
        "checkpoint": {"every": 2},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    return digits.write_config(folder, model, **sections)


def saved_rollouts(reference: Path) -> dict[str, str]:
    """The `debug` section of a run on the reference's rollouts: no engine has to start."""
    return {"train_only": str(reference.parent / "rollouts.safetensors")}


def submit(lab: SlurmLab, config: Path, *options: str, job: str = "train", env: str = "") -> str:
    """Submit by the command that users run, on both nodes with one rank each; the job's id.
    `env`: more lines of env.sh."""
    env_file = config.parent / "env.sh"
    env_file.write_text((TEMPLATES / "env.sh").read_text() + ENV + env)
    done = lab.run(
        sys.executable, "-m", "sfpo_megatron", "slurm", str(config), f"--job={job}",
        "--nodes=2", "--train-nodes=2", "--time=0:10:00", "--save-budget=30",
        f"--env={env_file}", *options,
    )  # fmt: skip
    assert done.stdout.startswith("submitted job "), done.stdout
    return done.stdout.split()[2].rstrip(":")


def output(run: Path, job: str) -> str:
    """What the job has written so far."""
    file = run / "slurm" / f"{job}.out"
    return file.read_text(errors="replace") if file.exists() else ""


def processes(lab: SlurmLab, job: str) -> dict[int, str]:
    """pid -> command line of every live process that has the job's id, and this lab, in its
    environment."""
    mine = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={lab.env['SLURM_CONF']}".encode()}
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if mine.issubset(variables) and state not in "ZX":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
        except OSError:
            continue
    return found


def wait_for_step(lab: SlurmLab, job: str, run: Path, step: int) -> None:
    """Until train step `step` has been logged."""

    def logged() -> bool:
        state = lab.state(job)
        assert state in ("RUNNING", "PENDING"), f"{state}: {output(run, job)}"
        return any(line["step"] >= step for line in lines(run) if "loss" in line)

    wait_for(logged, timeout_s=200, what=f"step {step} of {run}")


def left_after(lab: SlurmLab, job: str, limit_s: float) -> dict[int, str]:
    """Processes of the job that are still there when they have had `limit_s` to go."""
    deadline = time.monotonic() + limit_s
    while (left := processes(lab, job)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


class Timeline:
    """Seconds since something was done to a job, by what followed."""

    def __init__(self, done: str) -> None:
        self.done = done
        self._begun = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, what: str) -> None:
        self.seconds[what] = round(time.monotonic() - self._begun, 1)

    def __str__(self) -> str:
        return f"{self.done}: " + ", ".join(f"{k} after {v} s" for k, v in self.seconds.items())


def check(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`sfpo-megatron check`."""
    command = [sys.executable, "-m", "sfpo_megatron", "check", *options, str(config)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)


def resume(lab: SlurmLab, job: str, run: Path, timeline: Timeline) -> None:
    """The job goes back into the queue, is let go at once, and completes."""
    lab.wait_for_state(job, "PENDING", "COMPLETED", "FAILED", timeout_s=90)
    text = output(run, job)
    assert lab.state(job) == "PENDING" and lab.job(job)["Restarts"] == "1", text
    timeline.mark("requeued")
    lab.release(job)
    released = time.monotonic()
    wait_for(lambda: "resumed from" in output(run, job), timeout_s=150, what=f"job {job} to resume")
    timeline.seconds["resumed, from its release,"] = round(time.monotonic() - released, 1)
    lab.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=120)
    assert lab.state(job) == "COMPLETED", output(run, job)
