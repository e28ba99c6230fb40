"""Job scripts as text, the spread of ranks over nodes, Slurm's times: no Slurm needed.

That the scripts do what they say is tests/slurm's business.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config, write_run

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.slurm import submit
from sfpo_megatron.slurm.render import TEMPLATES, Job, render, write
from sfpo_megatron.slurm.walltime import format_time, parse_time

ROOT = Path(__file__).parents[2]
OPTIONS = ["--nodes=4", "--time=4:00:00"]


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`config(parallel={...}, rollout={...})` -> run.yaml in the current directory."""
    monkeypatch.chdir(tmp_path)
    model_dir()

    return write_run


def rendered(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["slurm", str(config), *OPTIONS, *options, "--dry-run"]) == 0
    return capsys.readouterr().out


def sruns(script: str) -> dict[str, str]:
    """Step name -> its whole srun command."""
    joined = re.sub(r"\\\n\s*", "", script)
    lines = [line for line in joined.splitlines() if "srun --job-name=" in line]
    return {line.split("--job-name=")[1].split()[0]: line for line in lines}


def test_what_the_script_has_to_say(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = rendered(
        config(parallel={"data": 16}),
        capsys,
        "--save-budget=240",
        "--sbatch=--partition=h100",
        "--sbatch=--account=me",
    )
    header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for option in (
        "--nodes=4", "--gpus-per-node=8", "--time=4:00:00", "--requeue", "--open-mode=append",
        "--signal=B:USR1@300", "--partition=h100", "--account=me",
        f"--output={tmp_path}/run/slurm/%j.out",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in header
    assert not re.search(r"@[A-Z_]+@", script), "every hole is filled"
    for line in (f"RUN={tmp_path}/run ", "TRAIN_NODES=2", "RANKS_PER_NODE=8", "SAVE_BUDGET_S=240 "):
        assert f"\n{line}" in script
    steps = sruns(script)
    assert steps.keys() == {"ray", "train"}
    assert 'bash "$RUN/slurm/ray_cluster.sh" beside ' in steps["train"]
    for name in steps:
        for flag in ("--overlap", '--gres="gpu:$GPUS_PER_NODE"', "--mem=0"):
            assert flag in steps[name], (name, flag)
    train = steps["train"]
    assert train.startswith("RAY_ADDRESS=$HEAD_ADDRESS:$RAY_PORT")
    for flag in (
        "--kill-on-bad-exit=1", '--shutdown-timeout="$SAVE_BUDGET_S"', "--rdzv-backend=static",
        "PET_NODE_RANK=$SLURM_NODEID", '--master-port="$MASTER_PORT"',
    ):  # fmt: skip
        assert flag in train
    assert "trap 'stop USR1' USR1" in script
    assert "exit 85" in (TEMPLATES / "job.sh").read_text()
    script += "".join(file.read_text() for file in TEMPLATES.iterdir() if file.is_file())
    assert "pkill" not in script and "killall" not in script
    order = ["\ncheck_config", "\npreflight", "--job-name=ray ", "--job-name=train "]
    assert sorted(order, key=script.index) == order


def test_colocated_engines_are_on_every_node(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every node trains, and is in the Ray cluster, whose members hear how many ranks they have."""
    run = config(parallel={"data": None}, rollout={"placement": "colocated", "num_engines": 32})
    script = rendered(run, capsys)
    for line in ("TRAIN_NODES=4", "RANKS_PER_NODE=8"):
        assert f"\n{line}\n" in script
    assert "\nexport GPUS_PER_NODE TRAIN_NODES RANKS_PER_NODE " in script
    assert '--nodes="${#NODES[@]}"' in sruns(script)["ray"]
    assert cli.main(["slurm", str(run), "rollout.num_engines=8", *OPTIONS, "--dry-run"]) == 2
    assert "expected engines on all 32 devices" in capsys.readouterr().err


def test_evaluation_script(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Engines on all nodes, no trainer, no time kept for a save."""
    script = rendered(config(rollout={"num_engines": 32}), capsys, "--job=eval", "--time=5")
    assert sruns(script).keys() == {"ray", "eval"}
    assert 'bash "$RUN/slurm/ray_cluster.sh" beside ' in sruns(script)["eval"]
    assert "--signal" not in script and "torch.distributed.run" not in script
    assert not re.search(r"@[A-Z_]+@", script)


@pytest.mark.parametrize(
    "alone", [{"rollout": {"placement": "colocated"}}, {"debug": {"train_only": "saved"}}]
)
@pytest.mark.parametrize(("engines", "code"), [(32, 0), (33, 2)])
def test_an_evaluations_engines_are_counted_wherever_the_run_has_them(
    config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    alone: dict[str, Any],
    engines: int,
    code: int,
) -> None:
    """`eval` starts them without a trainer."""
    Path("saved").write_text("{}")
    given = {**alone, "rollout": {**alone.get("rollout", {}), "num_engines": engines}}
    run = config(**given, parallel={"data": None})
    assert cli.main(["slurm", str(run), *OPTIONS, "--job=eval", "--dry-run"]) == code
    found = "--nodes: found 4, expected at least the 5 that 33 engines of 1 GPUs take"
    assert (found in capsys.readouterr().err) == (code == 2)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("train", "eval"):
        Path(f"{job}.sbatch").write_text(rendered(config(), capsys, f"--job={job}"))
    sources = sorted(f for f in (ROOT / "launch/slurm").iterdir() if f.is_file())
    done = subprocess.run(
        [
            "shellcheck",
            "-x",
            f"--source-path={ROOT}",
            "train.sbatch",
            "eval.sbatch",
            *map(str, sources),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_templates_are_the_ones_in_launch() -> None:
    assert TEMPLATES.resolve() == ROOT / "launch/slurm"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time=later"], "--time: found 'later', expected a time limit like"),
        (["--time=5"], "--time: found 5, expected more than the 0:06:00 that are kept"),
        (["--nodes=0"], "--nodes: found 0, expected 1 or more"),
        (["--sbatch=--qos=high\nrm x"], "--sbatch: found '--qos=high\\nrm x', expected one option"),
        (["--sbatch=qos=high"], "--sbatch: found 'qos=high', expected one option of sbatch"),
        (["--sbatch=--nodes=4"], "--sbatch: found '--nodes=4', expected an option that the job"),
        (["--env=none.sh"], "--env: found no file none.sh"),
        (["--env=crlf.sh"], "crlf.sh that end as on Windows (CRLF), expected LF alone"),
        (["--env=cut.sh"], "cut.sh: line 3: syntax error"),
        (["output_dir=a b"], "output_dir: found"),
        (["--job=eval", "rollout.tensor_parallel=16"], "rollout.tensor_parallel: found 16"),
        (["--job=eval", "rollout.num_engines=33"], "--nodes: found 4, expected at least the 5"),
        (["model.path=none"], "model.path: found"),
        (["parallel.tensor=3"], "parallel.tensor"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    Path("crlf.sh").write_bytes(b"export NAME=ib0\r\n")
    Path("cut.sh").write_text("true\nif true; then\n")
    overrides = [one for one in options if not one.startswith("--")]
    flags = [one for one in options if one.startswith("--")]
    assert cli.main(["slurm", str(config()), *overrides, *OPTIONS, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists() and not Path("a b").exists()


def test_submitted_from_inside_an_allocation(
    config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stand-in for sbatch only writes down its environment and its script's name."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho 7\n{{ env; echo "$2"; }} > {tmp_path}/seen\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "us")
    assert cli.main(["slurm", str(config()), *OPTIONS]) == 0
    assert capsys.readouterr().out.startswith("submitted job 7: ")
    seen = (tmp_path / "seen").read_text()
    assert "SBATCH_ACCOUNT=us" in seen and seen.endswith("run/slurm/train.sbatch\n")
    assert "SLURM_MEM_PER_CPU" not in seen and "SBATCH_TIMELIMIT" not in seen
    assert "\nread_env_begin" in (tmp_path / "run/slurm/train.sbatch").read_text()
    assert (tmp_path / "run/slurm/before_env.sh").exists()


@pytest.mark.parametrize(
    ("squeue", "code", "said"),
    [
        ("echo RUNNING", 2, "found job 6 of this run RUNNING, expected none"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", 0, ""),
        ("echo Unable to contact slurm controller >&2; exit 1", 2, "squeue: found Unable to"),
        ("exec sleep 9", 2, "squeue: found Command"),
        (None, 2, "squeue: found [Errno 2]"),
    ],
)
def test_an_earlier_job_of_the_run(
    squeue: str | None,
    code: int,
    said: str,
    config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only a job that Slurm has forgotten is no obstacle: where it does not answer, one may run.
    By stand-ins for Slurm's commands."""
    monkeypatch.setattr(submit, "TIMEOUT_S", 1)
    (tmp_path / "bin").mkdir()
    for name, lines in (("sbatch", "echo 7"), ("squeue", squeue)):
        if lines is not None:
            program = tmp_path / "bin" / name
            program.write_text(f"#!/bin/bash\n{lines}\n")
            program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    if squeue is None and shutil.which("squeue"):
        pytest.skip("Slurm is installed here")
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/job-id").write_text("6\n")
    assert cli.main(["slurm", str(config()), *OPTIONS]) == code
    assert said in capsys.readouterr().err


def test_bash_gets_every_path_as_it_is(config: Callable[..., Path], tmp_path: Path) -> None:
    """What would begin a word, end a quote, or stand for something else."""
    odd = f'{tmp_path}/it\'s "$HOME" $(exit 3) `exit 3`\nnext\\n é * ~ !@NODES@'
    run = f"{tmp_path}/é:~root:~"
    loaded = replace(load_config(config()), output_dir=run)
    job = Job(
        script="eval", nodes=1, time="1:00:00", gpus_per_node=8, work_dir=Path(odd), python=odd,
        save_budget_s=1, max_failures=1, env_file=TEMPLATES / "env.sh",
    )  # fmt: skip
    script = render(loaded, job, None)["eval.sbatch"].partition('cd "$WORK_DIR"')[0]
    tell = 'printf "%s\\0" "$RUN" "$WORK_DIR" "$SFPO_PYTHON"'
    done = subprocess.run(["bash", "-c", script + tell], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [run, odd, odd]


def test_an_env_file_in_another_encoding(tmp_path: Path) -> None:
    """A comment in Latin-1 is nothing to a shell: the job gets the file as it is."""
    content = "# cl\u00e9 de Rapha\u00ebl\nexport A=1\n".encode("latin-1")
    (tmp_path / "env.sh").write_bytes(content)
    job = Job(
        script="eval", nodes=1, time="1:00:00", gpus_per_node=8, work_dir=tmp_path, python="python",
        save_budget_s=60, max_failures=3, env_file=tmp_path / "env.sh",
    )  # fmt: skip
    config = replace(run_config(), output_dir=str(tmp_path / "run"))
    write(tmp_path / "slurm", render(config, job, None))
    assert (tmp_path / "slurm/env.sh").read_bytes() == content


def test_without_slurm_it_says_so(
    config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["slurm", str(config()), *OPTIONS]) == 2
    assert "sbatch: found no such program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("2-0:30", 174600),
        ("0-1:2:3", 3723),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds
    assert parse_time(format_time(seconds)) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "1h", "4:00:00:00", "-5", "1-", "UNLIMITED", "\u0664:00"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_time(text)
