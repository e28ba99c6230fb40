"""Rules of `check` about when a run ends, and what a warm start needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made.configs import run_check

from sfpo_megatron import cli
from sfpo_megatron.config.load import ConfigError, load_config

REFUSED = {
    "both lengths": (
        ["train.num_steps=5", "train.num_epochs=2"],
        "train.num_epochs: found 2, expected null with num_steps 5",
    ),
    "both lengths of sft": (
        ["sft.num_steps=5", "sft.num_epochs=2"],
        "sft.num_epochs: found 2, expected null with num_steps 5",
    ),
    "epochs of saved rollouts": (
        ["train.num_epochs=2", "debug.train_only=x.safetensors"],
        "train.num_epochs: found 2 with debug.train_only",
    ),
    "a target without evaluations": (
        ["eval.stop_at=0.9", "eval.every=0"],
        "eval.every: found 0 with eval.stop_at 0.9",
    ),
    "a target without prompts": (
        ["eval.stop_at=0.9", "data.eval=[]"],
        "eval.stop_at: found 0.9 with no source in data.eval",
    ),
    "a target in per cent": (["eval.stop_at=90"], "eval.stop_at: found 90"),
    "a held-out loss on nothing": (
        ["sft.eval_every=5", "data.eval=[]"],
        "sft.eval_every: found 5 with no source in data.eval",
    ),
    "a share that nothing measures": (
        ["sft.holdout=0.1"],
        "sft.holdout: found 0.1, expected 0 with eval_every 0",
    ),
    "a schedule that does not exist": (
        ["train.optimizer.lr_schedule=cosin"],
        "train.optimizer.lr_schedule: found 'cosin'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_start(case: str, here: Path) -> None:
    overrides, said = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        run_check(*overrides)
    assert said in str(refused.value)


def test_accepted(here: Path) -> None:
    assert run_check("train.num_epochs=2", "eval.stop_at=0.9", "sft.eval_every=5") == []
    assert run_check("sft.eval_every=5", "sft.holdout=0.1") == []
    config = load_config("run.yaml", ["train.num_steps=5"])
    assert config.train.steps == 5
    # Over a file that has num_steps: null takes it back.
    again = load_config("run.yaml", ["train.num_steps=null", "train.num_epochs=2"])
    assert (again.train.num_steps, again.train.num_epochs) == (None, 2)


def test_plan_says_what_the_epochs_come_to(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = ["train.num_epochs=3", "train.prompts_per_step=32"]
    assert cli.main(["plan", "run.yaml", *epochs]) == 0
    assert "3 epochs of at most 100 prompts: at most 9 train steps" in capsys.readouterr().out
    assert cli.main(["plan", "run.yaml"]) == 0
    assert "epochs" not in capsys.readouterr().out


def test_a_warm_start_needs_no_reward(here: Path) -> None:
    """The default reward is reasoning_gym's, whose problems files do not have; sft scores none."""
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = "data.train=[{source: jsonl, path: rows.jsonl}]"
    for check in ({}, {"for_training": True}, {"for_training": True, "only_reads": True}):
        with pytest.raises(ConfigError, match=r"reward\.function: found reasoning_gym with"):
            run_check(rows, **check)
    run_check(rows, for_training=True, fills_batches=False)
