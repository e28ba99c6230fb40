"""What `sfpo-megatron slurm` refuses, warns of and writes into a job's config; no Slurm needed.

Not exercised here: that a run in a job stops by it (tests/slurm, tests/e2e/test_resume.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made.configs import SUMS, write_run

from sfpo_megatron import cli
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.config.rules import low_precision
from sfpo_megatron.config.rules.model import model_of
from sfpo_megatron.planner.saving import saving_advice
from sfpo_megatron.slurm import command

ROOT = Path(__file__).parents[2]
JOB = ["--nodes=1", "--time=4:00:00", "--dry-run"]


@pytest.fixture
def run(
    tmp_path: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """`run(*words, **sections)` -> exit code, and what `slurm` says of run.yaml with them."""
    monkeypatch.chdir(tmp_path)
    model_dir()

    def slurm(*words: str, **sections: Any) -> tuple[int, str]:
        code = cli.main(["slurm", str(write_run(**sections)), *JOB, *words])
        return code, capsys.readouterr().err

    return slurm


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(config, job) of each script that is made."""
    made: list[tuple[Any, Any]] = []

    def noting(config: Any, job: Any, layout: Any) -> dict[str, str]:
        made.append((config, job))
        return {f"{job.script}.sbatch": ""}

    monkeypatch.setattr(command, "render", noting)
    return made


def test_what_a_login_node_lacks_is_no_fault_of_the_config(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python without pyarrow, datasets, TransformerEngine and tensorboard, as the wheel leaves
    it: warnings there, errors where the run starts. Files that are missing are missing in both."""
    for name in ("pyarrow", "datasets", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(low_precision, "find_spec", lambda name: None)
    Path("rows.parquet").write_bytes(b"PAR1")
    aware = {"optimizer": {"use_precision_aware_optimizer": True}}
    given = {
        "model": {"path": "model", "dtype": "bfloat16"},
        "data": {"train": [{"source": "parquet", "path": "rows.parquet"}, SUMS], "eval": [SUMS]},
        "reward": {"function": "math"},
        "megatron": aware,
        "tracking": {"sinks": ["tensorboard"]},
    }
    code, said = run(**given)
    assert code == 0
    for words in ("no pyarrow in this", "no TransformerEngine in this", "no library tensorboard"):
        assert f"and {words}" in said
    config = load_config("run.yaml")
    with pytest.raises(ConfigError, match="in this Python"):
        check_config(config, file="run.yaml", for_training=True)
    code, said = run("data.train.0.path=none.parquet", **given)
    assert code == 2 and "data.train.0.path: found no file 'none.parquet'" in said


@pytest.mark.parametrize(
    ("words", "limit_s", "budget_s"),
    [
        ((), 300.0, 300),
        (("--save-budget=900",), 900.0, 900),
        (("checkpoint.must_save_within_s=99.5",), 99.5, 100),
        (("checkpoint.must_save_within_s=60", "--save-budget=900"), 60.0, 900),
        (("checkpoint.stop_before_walltime_s=1800",), 1800.0, 1800),
        (("checkpoint.stop_before_walltime_s=20",), 300.0, 300),
        (("checkpoint.every=0",), None, 300),
        (("debug.rollout_only=true", "debug.save_rollouts=saved"), None, 300),
        (("--job=eval",), None, 300),
    ],
)
def test_a_run_in_a_job_counts_on_the_time_that_slurm_leaves_it(
    run: Callable[..., tuple[int, str]],
    jobs: list[tuple[Any, Any]],
    words: tuple[str, ...],
    limit_s: float | None,
    budget_s: int,
) -> None:
    """A step that does not end in it is given up; one that went on would end with TIMEOUT."""
    assert run(*words)[0] == 0
    ((config, job),) = jobs
    assert (config.checkpoint.must_save_within_s, job.save_budget_s) == (limit_s, budget_s)


def test_a_run_may_not_count_on_more(run: Callable[..., tuple[int, str]]) -> None:
    words = ("--save-budget=60", "checkpoint.must_save_within_s=600")
    code, said = run(*words)
    assert code == 2
    assert "--save-budget: found 60 with checkpoint.must_save_within_s 600, expected 600" in said
    assert run(*words, "--job=eval")[0] == 0, "an evaluation saves nothing"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("checkpoint.every=0", "checkpoint.every: found 0,"),
        ("debug.rollout_only=true", "debug.rollout_only: found true,"),
        ("seed=1", None),
    ],
)
def test_a_job_that_cannot_continue_is_warned_of(
    run: Callable[..., tuple[int, str]], override: str, key: str | None
) -> None:
    code, said = run(override)
    assert code == 0
    assert ("expected a run that saves" in said) == (key is not None)
    assert key is None or f"warning: {key}" in said


@pytest.mark.parametrize(
    ("hours", "overrides", "advised"),
    [
        (24.0, (), "set checkpoint.every=3"),
        (30.0, (), None),
        (0.5, (), "set checkpoint.every=3, and a longer --time"),
        (24.0, ("checkpoint.every=2",), None),
        (24.0, ("train.num_steps=40",), None),
        (24.0, ("checkpoint.every=0",), None),
    ],
)
def test_a_job_without_a_checkpoint(
    hours: float, overrides: tuple[str, ...], advised: str | None
) -> None:
    """70B on 32 GPUs, a step of 32 minutes by `plan`; the last step has a checkpoint in any case,
    and of a run that saves nothing another warning speaks."""
    file = ROOT / "examples/llama-3.1-70b/config.yaml"
    config = load_config(file, ["checkpoint.every=50", *overrides])
    folder = ROOT / config.model.path
    config = replace(config, model=replace(config.model, path=str(folder)))
    said = saving_advice(model_of(config, file=str(file)), config, job_s=hours * 3600)
    assert (said is None) == (advised is None)
    if said is not None and advised is not None:
        assert said.startswith("checkpoint.every: found 50, 27 hours") and said.endswith(advised)


def test_a_job_without_a_checkpoint_is_warned_of(run: Callable[..., tuple[int, str]]) -> None:
    """A refit alone takes seconds by `plan`, even with a tiny model."""
    long = ("checkpoint.every=10000", "train.num_steps=100000", "parallel.data=null")
    code, said = run(*long)
    assert code == 0 and "warning: checkpoint.every: found 10000, " in said
    code, said = run(*long, "checkpoint.every=100")
    assert code == 0 and "checkpoint.every" not in said
