"""How a job ends that is hit: by a job with a higher priority, by a killed process, by scancel.

`make test-full`; what was killed, and the seconds to the end, to the queue and to the next step, go
into benchmarks/results/slurm_ends.json. Not exercised: a node that dies (slurmd and its processes
share this machine).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import jobs
import pytest
from jobs import Timeline, resume
from lab import SlurmLab
from made.same_run import assert_same_run, lines
from made.waiting import wait_for

from benchmarks.common import provenance
from sfpo_megatron.checkpoints import manifest

pytestmark = pytest.mark.full

TIMES: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _results() -> Any:
    yield
    if TIMES:  # of the cases that ran; those of other sessions stay
        file = provenance.figures_of("slurm_ends")
        earlier = json.loads(file.read_text())["seconds"] if file.exists() else {}
        provenance.write_cpu("slurm_ends", {"seconds": earlier | TIMES})


def record(timeline: Timeline) -> None:
    print(timeline)
    TIMES[timeline.done] = timeline.seconds


def test_preempted_by_a_higher_partition(
    lab: SlurmLab, model: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = jobs.write_config(tmp_path, model, debug=jobs.saved_rollouts(reference))
    job = jobs.submit(lab, config, "--sbatch=--partition=low")
    jobs.wait_for_step(lab, job, run, 1)
    timeline = Timeline("preempted by partition high")
    urgent = lab.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap=sleep 3",
    ).stdout.strip()  # fmt: skip
    lab.wait_for_state(urgent, "RUNNING", "COMPLETED", timeout_s=90)
    timeline.mark("the other job runs")
    lab.wait_for_state(urgent, "COMPLETED", timeout_s=30)
    resume(lab, job, run, timeline)
    assert_same_run(run, reference, engines=False)
    record(timeline)


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("a trainer rank", "-u -m sfpo_megatron train"),
        ("an engine", "ray::Engine"),
        ("the head of Ray", "gcs_server"),
    ],
)
def test_killed(
    lab: SlurmLab, model: Path, reference: Path, tmp_path: Path, what: str, command: str
) -> None:
    """kill -9. The job ends by itself within a minute, or the run recovers; it completes."""
    run = tmp_path / "run"
    job = jobs.submit(lab, jobs.write_config(tmp_path, model))
    # There is a checkpoint of step 2 (checkpoint.every); its own save may be hit.
    jobs.wait_for_step(lab, job, run, random.randint(3, 4))
    victims = [pid for pid, line in jobs.processes(lab, job).items() if command in line]
    assert victims, jobs.processes(lab, job)
    timeline = Timeline(f"kill -9 of {what}")
    os.kill(max(victims), signal.SIGKILL)
    lab.wait_for_state(job, "PENDING", "COMPLETED", "FAILED", timeout_s=90)
    if lab.state(job) == "COMPLETED":
        timeline.mark("completed, without a requeue")
    else:
        resume(lab, job, run, timeline)
    assert_same_run(run, reference, but=("num_engine_restarts", "num_reissued"))
    record(timeline)


def test_cancelled_in_mid_generation(lab: SlurmLab, model: Path, tmp_path: Path) -> None:
    """Nothing of the job remains after 10 s; the checkpoint is whole; it is not requeued."""
    run = tmp_path / "run"
    # Long responses: most of a step is generation, and the moment is in it.
    config = jobs.write_config(
        tmp_path,
        model,
        rollout={"max_response_tokens": 240},
        train={"num_steps": 50, "max_tokens_per_microbatch": 4096},
    )
    job = jobs.submit(lab, config)
    jobs.wait_for_step(lab, job, run, 3)
    steps = [line for line in lines(run) if "loss" in line]
    generate_s = steps[-1]["time/generate_s"]
    assert generate_s > 0.5, "too short to be hit"
    time.sleep(generate_s / 2)
    assert len([line for line in lines(run) if "loss" in line]) == len(steps)
    timeline = Timeline("scancel in mid-generation")
    lab.run("scancel", job)
    left = jobs.left_after(lab, job, 10)
    timeline.mark("no process left")
    assert not left, left
    lab.wait_for_state(job, "CANCELLED", timeout_s=10)
    found = sorted((run / "checkpoints").glob("step_*"))
    assert found
    for directory in found:
        assert manifest.faults(directory) == []
    time.sleep(2)
    assert lab.state(job) == "CANCELLED"
    record(timeline)


def test_gives_up_after_failures_without_progress(
    lab: SlurmLab, model: Path, tmp_path: Path
) -> None:
    """Ray is killed as it starts, twice; on a cluster that does not requeue by exit code."""
    run = tmp_path / "run"
    lab.requeue_by_exit_code(False)
    try:
        job = jobs.submit(lab, jobs.write_config(tmp_path, model), "--max-failures=2")
        for state in ("PENDING", "FAILED"):
            lab.wait_for_state(job, "RUNNING", timeout_s=30)
            os.kill(wait_for_process(lab, job, "scripts start --block"), signal.SIGKILL)
            lab.wait_for_state(job, "FAILED", "PENDING", timeout_s=60)
            assert lab.state(job) == state, jobs.output(run, job)
            if state == "PENDING":
                lab.release(job)
    finally:
        lab.requeue_by_exit_code(True)
    text = jobs.output(run, job)
    assert "Ray did not start on" in text and "(failure 1 of 2)" in text
    assert "2 failures in a row without a new checkpoint" in text
    assert not jobs.left_after(lab, job, 10)


def wait_for_process(lab: SlurmLab, job: str, command: str) -> int:
    """The pid of the job's process with that in its command line, once there is one."""
    found: list[int] = wait_for(
        lambda: [pid for pid, line in jobs.processes(lab, job).items() if command in line],
        timeout_s=60,
        what=command,
    )
    return found[0]
