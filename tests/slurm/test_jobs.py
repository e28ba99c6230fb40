"""Jobs on two nodes of a real Slurm: a whole run, and one that is wrong from the start.

Not exercised: GPUs, several hosts, cgroups, containers.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import jobs
import pytest
import yaml
from jobs import resume
from lab import SlurmLab
from made.same_run import assert_same_run


def test_run_on_two_nodes_equals_the_run_without_slurm(
    lab: SlurmLab, model: Path, reference: Path, tmp_path: Path
) -> None:
    """Ray and torchrun across both nodes; the same metrics to the last bit; nothing left."""
    run = tmp_path / "run"
    job = jobs.submit(lab, jobs.write_config(tmp_path, model))
    lab.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=150)
    text = jobs.output(run, job)
    assert lab.state(job) == "COMPLETED", text
    assert f"job {job}.0 on node1 node2" in text
    assert_same_run(run, reference)
    logs = run / "slurm" / "logs" / f"{job}.0"
    for node in (0, 1):
        assert "Ray runtime started" in (logs / f"ray-{node}.log").read_text()
        assert list((logs / f"node-{node}").rglob("stdout.log")), "a log for each rank"
    assert not (logs / "ray-token").exists()
    assert not jobs.left_after(lab, job, 10)


@pytest.mark.parametrize("engines", [False, pytest.param(True, marks=pytest.mark.full)])
def test_stopped_by_usr1_it_is_requeued_and_continues(
    lab: SlurmLab, model: Path, reference: Path, tmp_path: Path, engines: bool
) -> None:
    """At a random step Slurm's signal comes; saved, requeued, continued: the metrics and the
    weights of the run without a break. Without engines: on its rollouts."""
    run = tmp_path / "run"
    debug = {} if engines else jobs.saved_rollouts(reference)
    job = jobs.submit(lab, jobs.write_config(tmp_path, model, debug=debug))
    jobs.wait_for_step(lab, job, run, random.randint(1, jobs.NUM_STEPS - 3))
    timeline = jobs.Timeline("USR1")
    lab.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@S does
    resume(lab, job, run, timeline)
    assert "USR1: asking the run to save and stop" in jobs.output(run, job)
    assert "the run has saved and stopped: back into the queue" in jobs.output(run, job)
    assert_same_run(run, reference, engines=engines)
    print(timeline)


# As in an allocation of one core with memory by the core, whose variables srun takes for options,
# and an env.sh of scripts that bear neither `set -u` nor `set -e`.
ALLOCATION = {
    "SLURM_MEM_PER_CPU": "1000",
    "SLURM_MEM_PER_GPU": "1000",
    "SLURM_NTASKS": "7",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_EXPORT_ENV": "NONE",
    "SQUEUE_PARTITION": "elsewhere",
}
LAX_ENV = 'grep -q nothing /dev/null || true\nexport LEFT="$NEVER_SET"\n[[ -e /nowhere ]] && true\n'


def test_wrong_config_fails_before_anything_starts(
    lab: SlurmLab, model: Path, tmp_path: Path
) -> None:
    """The config is broken while the job waits: it says within seconds what `check` says. The job
    is handed to sbatch once more, as it is, from inside of another allocation."""
    run = tmp_path / "run"
    config = jobs.write_config(tmp_path, model)
    lab.run("scancel", jobs.submit(lab, config, "--sbatch=--hold", env=LAX_ENV))
    script = str(run / "slurm" / "train.sbatch")
    job = lab.run("sbatch", "--parsable", script, env=lab.env | ALLOCATION).stdout.strip()
    config = run / "slurm" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["train"]["max_tokens_per_microbatch"] = 8
    config.write_text(yaml.safe_dump(tree))
    expected = jobs.check(config, "--world-size=2")
    assert expected.returncode == 2 and "max_tokens_per_microbatch" in expected.stderr
    lab.run("scontrol", "release", job)
    begun = time.monotonic()
    lab.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=30)
    assert time.monotonic() - begun < 15
    assert lab.job(job)["ExitCode"] == "2:0" and lab.job(job)["Restarts"] == "0"
    text = jobs.output(run, job)
    assert expected.stderr in text, text
    assert not list((run / "slurm" / "logs").rglob("ray-*")), text
    assert not (run / "metrics.jsonl").exists()
