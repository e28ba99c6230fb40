"""How a job script begins: it forgets where it was submitted from, and reads env.sh.

By real bash; that jobs run so is tests/slurm's business. Not exercised: a real conda or Lmod.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sfpo_megatron.slurm.render import TEMPLATES
from sfpo_megatron.slurm.submit import without_allocation

SCRIPT = f"""
set -euo pipefail
cd "$1"
source {TEMPLATES}/before_env.sh
forget_the_submitter
read_env_begin "$1/env.sh"
source "$1/env.sh"
read_env_end $?
echo "now $- in $PWD, args $#, $(set -o | grep pipefail | tr -d ' \\t')"
env
"""


def read_env(
    folder: Path, text: str, then: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """`then`: what the script does next."""
    (folder / "env.sh").write_text(text)
    return subprocess.run(
        ["bash", "-c", SCRIPT + then, "bash", str(folder)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **variables},
        timeout=20,
    )


# What conda's activation, Lmod's and Tcl's modules, a venv's activate and setvars scripts do.
LAX = {
    "an unset variable": 'source other.sh\nexport X="$NEVER_SET"',
    "a command that fails inside": "source other.sh",
    "a function that goes on": "f() { false; grep -q x /dev/null; return 0; }\nf",
    "a test as the last line": "[[ -e /nowhere ]] && source /nowhere",
    "a failed pipe": "false | cat",
    "a guarded failure": "false || true\nif ! false; then :; fi",
    "a substitution that fails": "export X=$(false)",
    "options that it leaves": "set +eu\nset +o pipefail\nIFS=,\ncd /",
}


@pytest.mark.parametrize("name", LAX)
def test_what_is_no_failure(tmp_path: Path, name: str) -> None:
    (tmp_path / "other.sh").write_text('false\n[ -n "$ALSO_NOT_SET" ]\ntrue\n')
    done = read_env(tmp_path, f"{LAX[name]}\n")
    assert done.returncode == 0, done.stderr
    assert f"in {tmp_path}, args 1, pipefailon" in done.stdout
    options = done.stdout.split()[1]
    assert "e" in options and "u" in options, "the script itself is as strict as before"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("true\nmodule load cuda\n", "env.sh:2: `module load cuda` ended with 127, expected 0"),
        ("\n\nsource /nowhere/activate\n", "env.sh:3: `source /nowhere/activate` ended with 1"),
        ("f() { return 4; }\nf\n", "env.sh:2: `f` ended with 4"),
        ("source broken.sh\n", "env.sh:1: `source broken.sh` ended with 3"),
        ("true\ntrue || exit 0\nexit 0\n", "env.sh: it ended the job (exit code 0)"),
        ("true\nreturn 5\n", "env.sh:2: it returned 5"),
        ("true\nif true; then\n", "env.sh: line 3: syntax error"),
        (': "${SITE:?name your site}"\n', "env.sh: line 1: SITE: name your site"),
        ("set -e\ntrue\nfalse\n", "env.sh:3: `false` ended with 1"),
    ],
)
def test_what_fails_ends_the_job_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.sh").write_text("false\nreturn 3\n")
    done = read_env(tmp_path, text)
    assert done.returncode == 1 and "now " not in done.stdout
    assert message in done.stderr


def test_what_is_declared_there_is_seen_by_the_job(tmp_path: Path) -> None:
    done = read_env(tmp_path, "declare -x NCCL_SOCKET_IFNAME=ib0\nexport B=2\n")
    assert {"NCCL_SOCKET_IFNAME=ib0", "B=2"} <= {*done.stdout.splitlines()}


ALLOCATION = {
    "SLURM_MEM_PER_CPU": "1000",
    "SLURM_MEM_PER_GPU": "1000",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_LIST": "0x1",
    "SLURM_NTASKS": "7",
    "SLURM_NPROCS": "7",
    "SLURM_NTASKS_PER_NODE": "7",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_STEP_ID": "4",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_GPUS_PER_NODE": "h100:8",  # with --gres=gpu:8 of a step srun refuses it
    "SRUN_CPUS_PER_TASK": "3",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_NO_REQUEUE": "1",
    "SALLOC_ACCOUNT": "x",
    "SQUEUE_PARTITION": "elsewhere",
    "SQUEUE_FORMAT": "%j",
}
OWN = {
    "SLURM_JOB_ID": "12",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "SLURM_JOB_END_TIME": "99",
}


def test_the_job_forgets_the_allocation_it_was_submitted_from(tmp_path: Path) -> None:
    done = read_env(tmp_path, "", **ALLOCATION, **OWN)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert not found.keys() & ALLOCATION.keys()
    assert found.items() >= OWN.items()


def test_env_sh_may_set_such_variables(tmp_path: Path) -> None:
    done = read_env(tmp_path, "export SLURM_HINT=nomultithread\n", SLURM_HINT="multithread")
    assert "SLURM_HINT=nomultithread" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("text", "then", "expected"),
    [
        ("", "", "{here}"),
        ("CONTAINER_SRUN=() CONTAINER_EXEC=()\n", "", "{here}"),
        ("CONTAINER_EXEC=(env -C /)\n", "", "{here}"),
        ("CONTAINER_SRUN=(env) CONTAINER_EXEC=(-C /)\n", "", "{here}"),
        ("CONTAINER_EXEC=(env -C /)\n", 'mv "$1" "$1.away"\n', "/"),  # not mounted there
    ],
)
def test_a_container_begins_where_the_job_does(
    tmp_path: Path, text: str, then: str, expected: str
) -> None:
    """pyxis begins in the image's own directory: relative paths of the config led nowhere."""
    here = tmp_path / "a b"
    here.mkdir()
    done = read_env(here, text, f'{then}"${{IN_CONTAINER[@]}}" pwd')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == expected.format(here=here)
    assert ("No such file or directory" in done.stderr) == bool(then)


def test_nothing_of_an_allocation_is_handed_to_sbatch() -> None:
    """But for where the user's jobs go, and who pays."""
    kept = {"SLURM_CONF": "c", "SBATCH_ACCOUNT": "a", "SBATCH_PARTITION": "p", "PATH": "/bin"}
    assert without_allocation({**ALLOCATION, "SLURM_JOB_ID": "1", **kept}) == kept


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("SFPO_PYTHON=echo\nCONTAINER_EXEC=(env -u X)\n", 0, "tools/convert.py --out x y"),
        ("true\nif true; then\n", 1, "env.sh: line 3: syntax error"),
        ("exit 0\n", 1, "env.sh: it ended the job (exit code 0)"),
        ("true\nfalse\n", 1, "env.sh:2: `false` ended with 1"),
    ],
)
def test_the_converters_job_begins_like_the_others(
    tmp_path: Path, text: str, code: int, message: str
) -> None:
    """`srun` is a script here that runs what it is given; tests/slurm has the real one."""
    srun, tools = tmp_path / "bin/srun", tmp_path / "tools"
    srun.parent.mkdir()
    srun.write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nenv | grep ^S\nexec "$@"\n')
    srun.chmod(0o755)
    tools.mkdir()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/slurm").symlink_to(TEMPLATES)
    (tmp_path / "env.sh").write_text(text)
    done = subprocess.run(
        ["bash", TEMPLATES / "convert.sbatch", "tools/convert.py", "--out", "x y"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": f"{srun.parent}:/usr/bin:/bin", "SFPO_ENV": str(tmp_path / "env.sh")}
        | ALLOCATION
        | OWN,
        timeout=20,
    )
    assert done.returncode == code, done.stderr
    assert message in (done.stderr if code else done.stdout)
    assert not any(line.partition("=")[0] in ALLOCATION for line in done.stdout.splitlines())


def test_a_converters_job_without_a_checkout_says_what_it_looked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", TEMPLATES / "convert.sbatch", "convert.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=20,
    )
    assert done.returncode == 2 and "found no launch/slurm/before_env.sh" in done.stderr
