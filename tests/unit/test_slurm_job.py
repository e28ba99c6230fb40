"""How a job script begins and how it ends, by real bash; Slurm's commands are functions.

Whole jobs on a real Slurm: tests/slurm.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sfpo_megatron.slurm.render import TEMPLATES

BEGIN = f"""
set -euo pipefail
RUN=$1 CONFIG=c.yaml GPUS_PER_NODE=8 SFPO_PYTHON=python3 MAX_FAILURES=3
SLURM_JOB_ID=$2 SLURM_JOB_NODELIST=node SLURM_JOB_END_TIME=1
source {TEMPLATES}/job.sh
source {TEMPLATES}/ray_cluster.sh
address_of() {{ echo 10.0.0.1; }}
squeue() {{ echo COMPLETING; }}
scontrol() {{ [[ $2 == hostnames ]] && echo node-1 || echo "RequeueExit = 85"; }}
"""


def bash(script: str, run: Path, job: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", BEGIN + script, "bash", str(run), str(job)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=20,
    )


def test_no_two_ports_of_neighbouring_jobs_are_one(tmp_path: Path) -> None:
    """Two jobs on a node have numbers in a row; the kernel gives out ports from 32768 on."""
    ports = []
    for job in (1, 2, 3, 4999, 5000, 123_456, 123_457):
        done = bash('begin > /dev/null\necho "$RAY_PORT $MASTER_PORT"', tmp_path, job)
        assert done.returncode == 0, done.stderr
        ports += map(int, done.stdout.split())
    assert len(set(ports)) == len(ports) and all(1024 < port < 32768 for port in ports)


def test_every_node_hears_its_address_from_the_batch_script(tmp_path: Path) -> None:
    """A step may run in a container, where Slurm cannot be asked. The third node's own name is all
    that is known of it."""
    nodes = "scontrol() { printf 'node-%s\\n' 1 2 3; }\n"
    addresses = 'address_of() { [[ $1 != node-3 ]] || return 1; echo "10.0.0.${1#node-}"; }\n'
    show = 'begin > /dev/null\necho "$HEAD_ADDRESS; $(printenv NODE_ADDRESSES)"'
    done = bash(nodes + addresses + show, tmp_path, 7)
    assert done.stdout == "10.0.0.1; 10.0.0.1 10.0.0.2 -\n", done.stderr


def test_failures_in_a_row_end_a_job(tmp_path: Path) -> None:
    """The third in a row without a new checkpoint; a checkpoint between them begins again."""
    codes = []
    (tmp_path / "slurm").mkdir()
    (tmp_path / "checkpoints").mkdir()
    for latest in ("step_1", "step_1", "step_2", "step_2", "step_2"):
        (tmp_path / "checkpoints/latest").write_text(latest + "\n")
        done = bash("requeue_after_failure 'it fell'", tmp_path, 7)
        codes.append(done.returncode)
    assert codes == [85, 85, 85, 85, 1], done.stderr
    assert "3 failures in a row without a new checkpoint" in done.stderr


def test_a_count_of_failures_that_is_none_begins_again(tmp_path: Path) -> None:
    """Instead of an end of the job without a word, and without a requeue."""
    (tmp_path / "slurm").mkdir()
    for content in ("", "\n", "x none\n", "\0\0\0", "2"):
        (tmp_path / "slurm/failures.7").write_text(content)
        done = bash("requeue_after_failure 'it fell'", tmp_path, 7)
        assert done.returncode == 85 and "(failure 1 of 3)" in done.stdout, done.stderr
        assert (tmp_path / "slurm/failures.7").read_text() == "1 none\n"


@pytest.mark.parametrize("broken", ["scontrol() { return 1; }", "mkdir $RUN/slurm/failures.7"])
def test_a_failure_is_requeued_whatever_else_fails(tmp_path: Path, broken: str) -> None:
    """Slurm's controller does not answer; the count cannot be written."""
    (tmp_path / "slurm").mkdir()
    done = bash(f"{broken}\nrequeue_after_failure 'it fell'", tmp_path, 7)
    assert done.returncode == 85 and "it fell (failure 1 of 3)" in done.stdout, done.stderr


def test_failures_that_cannot_be_counted_are_restarts(tmp_path: Path) -> None:
    """A folder that cannot be written: the job would be requeued for ever."""
    codes = []
    (tmp_path / "slurm/failures.7").mkdir(parents=True)
    for restart in range(3):
        done = bash("requeue_after_failure fell", tmp_path, 7, SLURM_RESTART_COUNT=str(restart))
        codes.append(done.returncode)
    assert codes == [85, 85, 1], done.stderr
    assert "all restarts of this job count as failures" in done.stdout


def test_a_full_disk_leaves_the_count_before(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/failures.7").write_text("2 none\n")
    (tmp_path / "slurm/failures.7.new").symlink_to("/dev/full")
    done = bash("requeue_after_failure fell", tmp_path, 7)
    assert done.returncode == 85 and "failures.7 cannot be written" in done.stdout
    assert (tmp_path / "slurm/failures.7").read_text() == "2 none\n"


def test_a_token_that_cannot_be_removed_leaves_the_exit_code(tmp_path: Path) -> None:
    done = bash("begin\nrm() { return 1; }\nrequeue why", tmp_path, 7)
    assert done.returncode == 85, done.stderr


@pytest.mark.parametrize("file", ["/dev/full", "/nowhere/stop-requested"])
def test_a_request_to_stop_that_cannot_be_written_does_not_end_the_job(
    tmp_path: Path, file: str
) -> None:
    script = f"STOP_FILE={file}\ntrap 'stop USR1' USR1\nkill -USR1 $$\necho \"went on $STOPPING\""
    done = bash(script, tmp_path, 7)
    assert done.returncode == 0 and "went on 1" in done.stdout, done.stderr
    assert (f"{file} cannot be written" in done.stdout) == (file != "/dev/full")


def test_a_job_whose_output_cannot_be_written_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    done = bash("requeue_after_failure 'it fell' > /dev/full", tmp_path, 7)
    assert done.returncode == 85
    assert (tmp_path / "slurm/failures.7").read_text() == "1 none\n"


def test_an_end_of_the_job_that_squeue_does_not_tell_is_none(tmp_path: Path) -> None:
    """To date, an empty one is midnight, which has passed."""
    for squeue, end in ((":", ""), ("return 1", ""), ("echo N/A", ""), ("echo @99", "99")):
        script = f"unset SLURM_JOB_END_TIME\nsqueue() {{ {squeue}; }}\nbegin > /dev/null\n"
        done = bash(script + 'echo "<$SLURM_JOB_END_TIME>"', tmp_path, 7)
        assert done.stdout == f"<{end}>\n", done.stderr


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("mkdir() { return 1; }", "/logs/7.0 cannot be made"),
        ("scontrol() { [[ $2 != hostnames ]]; }", "scontrol does not name the nodes"),
        ("address_of() { return 1; }; own_address() { return 1; }", "node-1 has no address"),
        ("head() { return 1; }", "Ray's token cannot be written"),
        ("begin > /dev/null; LOGS=/nowhere; begin() { :; }", "Ray's token cannot be written"),
    ],
)
def test_a_beginning_that_fails_is_a_failure_like_others(
    tmp_path: Path, broken: str, said: str, continues: bool
) -> None:
    """A file system or Slurm's controller may be away for a moment."""
    (tmp_path / "slurm").mkdir()
    token = (line for line in (TEMPLATES / "train.sbatch").open() if "make_ray_token" in line)
    kind = "" if continues else "unset MAX_FAILURES"
    done = bash("\n".join([kind, broken, "begin", *token]), tmp_path, 7)
    assert done.returncode == (85 if continues else 1), done.stderr
    assert said in (done.stdout if continues else done.stderr)
    assert (tmp_path / "slurm/failures.7").exists() == continues


@pytest.mark.parametrize(
    ("latest", "stopping", "own", "end", "said"),
    [
        ("step_2", 1, "", 400, "the run has saved and stopped: back into the queue"),
        ("step_2", 0, "", 4000, "the run has saved and stopped: back into the queue"),
        ("step_1", 0, "", 4000, "the run stopped itself, and has saved nothing (failure 1 of 3)"),
        ("step_1", 1, "Ray ended", 4000, "Ray ended, and the run has saved nothing (failure 1 of"),
        ("step_1", 1, "", 400, "longer --time or a smaller checkpoint.every (failure 1 of 3)"),
        ("step_1", 1, "", -10, "longer --time or a smaller checkpoint.every (failure 1 of 3)"),
        ("step_1", 1, "", 440, "stopped, with nothing new to save: back into the queue"),
        ("step_1", 1, "", None, "stopped, with nothing new to save: back into the queue"),
    ],
)
def test_a_stop_with_nothing_saved_is_a_failure_but_for_a_preemption(
    tmp_path: Path, latest: str, stopping: int, own: str, end: int | None, said: str
) -> None:
    """USR1 comes 300 + 60 s before the end, or a minute earlier; other jobs preempt at any time."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text(latest + "\n")
    ends = "''" if end is None else f"$(($(date +%s) + {end}))"
    script = f"SLURM_JOB_END_TIME={ends} SAVE_BUDGET_S=300 FIRST=step_1 STOPPING={stopping}\n"
    done = bash(f"{script}OWN_STOP='{own}'\nrequeue_stopped", tmp_path, 7)
    assert done.returncode == 85 and said in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "slurm/failures.7").exists() == ("failure 1" in said)


@pytest.mark.parametrize(
    ("job", "ended", "code"),
    [
        ("train", 0, 0),
        ("train", 2, 2),
        ("train", 1, 85),
        ("train", 137, 85),
        ("eval", 2, 2),
        ("eval", 1, 1),
    ],
)
def test_only_a_wrong_config_ends_a_job_for_good(
    tmp_path: Path, job: str, ended: int, code: int
) -> None:
    """A file system that is away for a moment is none; an evaluation has nothing to continue."""
    (tmp_path / "slurm").mkdir()
    failures = "" if job == "train" else "unset MAX_FAILURES\n"
    script = f"{failures}srun() {{ return {ended}; }}\ncheck_config --world-size 2"
    done = bash(script, tmp_path, 7)
    assert done.returncode == code, done.stderr
    said = "check ended with" in done.stdout + done.stderr
    assert said == (ended not in (0, 2))
    assert (tmp_path / "slurm/failures.7").exists() == (code == 85)
