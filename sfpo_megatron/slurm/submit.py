"""Writes a rendered job into its run directory and hands it to sbatch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import require_writable
from sfpo_megatron.slurm.render import write

_JOB_FILE = "job-id"
TIMEOUT_S = 60
_SLURMS = re.compile(r"(SLURM|SRUN|SBATCH|SALLOC|SQUEUE|SCANCEL|SCONTROL|SPANK)_")
_KEPT = re.compile(
    r"SLURM_(CONF|CLUSTERS|JWT|CONF_SERVER|DEBUG_FLAGS)"
    r"|SBATCH_(ACCOUNT|PARTITION|QOS|RESERVATION|CLUSTERS|CONSTRAINT|WCKEY)"
)
"""A user's own defaults for where jobs go and who pays, which no allocation sets."""
_FORGOTTEN = "Invalid job id"
"""What squeue says of a job that ended a while ago."""


class SubmitError(RuntimeError):
    """Slurm is not here, or did not take the job."""


def submit(run: RunDirectory, script: str, files: dict[str, str]) -> str:
    """The job's id. Refused while an earlier job of the same run is in the queue: two would write
    the same files."""
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "sbatch: found no such program, expected Slurm's client; run this on a login node, or "
            "look at the script with --dry-run"
        )
    job_file = run.slurm / _JOB_FILE
    if job_file.exists():
        earlier = job_file.read_text(encoding="utf-8", errors="replace").strip()
        if state := _state(earlier):
            raise SubmitError(
                f"{run.path}: found job {earlier} of this run {state}, expected none; wait for it, "
                f"run scancel {earlier}, or set another output_dir"
            )
    require_writable(run)
    write(run.slurm, files)
    done = _run("sbatch", "--parsable", str(run.slurm / script))
    if done.returncode != 0:
        raise SubmitError(f"sbatch refused {run.slurm / script}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    write(run.slurm, {_JOB_FILE: f"{job}\n"})
    return job


def _state(job: str) -> str:
    """PENDING, RUNNING, ... or empty for a job that is not in the queue any more."""
    done = _run("squeue", "-h", "-j", job, "-o", "%T")
    if done.returncode == 0:
        return done.stdout.strip()
    if _FORGOTTEN in done.stderr:
        return ""
    found = done.stderr.strip() or f"exit code {done.returncode}"
    raise SubmitError(
        f"squeue: found {found}, expected the state of job {job}, an earlier one of this run; "
        "submit again when Slurm answers"
    )


def without_allocation(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what an allocation that one submits from has set. Slurm's commands take
    such variables for options, before those of the script, and sbatch hands them on to the job."""
    return {k: v for k, v in environ.items() if not _SLURMS.match(k) or _KEPT.fullmatch(k)}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env=without_allocation(os.environ),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmitError(
            f"{command[0]}: found {error}, expected an answer within {TIMEOUT_S} s; look at "
            "`squeue --me` when Slurm answers, and submit again if the job is not there"
        ) from error
