"""The words of a command line: options, overrides and CONFIG in any order, for every command."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sfpo_megatron import cli

OPTIONS: dict[str, list[list[str]]] = {
    "train": [["--fresh"]],
    "sft": [["--fresh"]],
    "eval": [],
    "check": [["--world-size", "2"], ["--fresh"]],
    "plan": [["--nodes", "2"], ["--gpu=h100-80gb"]],
    "slurm": [["--nodes", "1"], ["--time=1:00:00"], ["--sbatch=--partition=a b"]],
}
OVERRIDES = [["seed=1"], ["train.optimizer.lr=-1"], ["seed= 2"], ["data.prompt_suffix= a=-b c"]]


@pytest.mark.parametrize("command", OPTIONS)
def test_every_order(command: str) -> None:
    """CONFIG, options and overrides in all orders of their kinds, options among the overrides."""
    expected = [text for (text,) in OVERRIDES]
    parts = [["run.yaml"], *OPTIONS[command]]
    for order in itertools.permutations(parts):
        for split in range(len(order) + 1):
            words = [*order[:split], *OVERRIDES[:2], *order[split:], *OVERRIDES[2:]]
            arguments = cli.parse([command, *itertools.chain.from_iterable(words)])
            assert arguments.config == "run.yaml"
            assert arguments.overrides == expected
            if command == "slurm":
                assert (arguments.nodes, arguments.time) == (1, "1:00:00")
                assert arguments.sbatch == ["--partition=a b"]
            if command == "check":
                assert arguments.world_size == 2 and arguments.fresh


def test_the_config_is_the_word_that_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind an option that there is not, whose value is another word."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("")
    with pytest.raises(SystemExit):
        cli.parse(["check", "--n-samples-per-prompt", "8", "a.yaml"])
    said = capsys.readouterr().err
    assert "found '--n-samples-per-prompt'" in said and "did you mean train.group_size?" in said


def test_a_file_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3.yaml").write_text("")
    for name in ("lr=3.yaml", "./lr=3.yaml", "runs/lr=3.yaml"):
        arguments = cli.parse(["check", name, "seed=1"])
        assert (arguments.config, arguments.overrides) == (name, ["seed=1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check"], "the following arguments are required: CONFIG"),
        (["check", "seed=1"], "found 'seed=1', expected CONFIG, a YAML file, before KEY=VALUE"),
        (["train", "seed=1", "--fresh"], "expected CONFIG, a YAML file"),
        (["check", "a.yaml", "b.yaml"], "found 'b.yaml', expected an option"),
        (["check", "seed=1", "a.yaml", "b.yaml"], "found 'b.yaml', expected an option"),
        (["check", "a.yaml", "--world", "1"], "found '--world', expected an option"),
        (["check", "a.yaml", "--worldsize", "2"], "did you mean --world-size?"),
        (["plan", "a.yaml", "--node", "2"], "did you mean --nodes?"),
        (["train", "a.yaml", "--hf-checkpoint", "x"], "did you mean model.path? A key is set by"),
        (["train", "a.yaml", "--train.num-steps=3"], "KEY=VALUE; write train.num_steps=3"),
        (["train", "a.yaml", "--output-dir", "x"], "KEY=VALUE; write output_dir=VALUE"),
        (["train", "a.yaml", "train.num_steps:3"], "KEY=VALUE; write train.num_steps=3"),
        (
            ["slurm", "a.yaml", "--nodes=1", "--time=9", "--partition=h100"],
            "an option of sbatch itself is given as --sbatch=--partition=h100",
        ),
        (["train", "--config", "a.yaml"], "give the file alone"),
        (["train", "a.yaml", "--zzz"], "`sfpo-megatron COMMAND --help` lists its options"),
        (["doctor", "--hf-checkpoint"], "COMMAND --help` lists its options"),
        (["check", "a.yaml", "--world-size=0"], "found '0', expected a number of 1 or more"),
        (["check", "a.yaml", "--world-size", "-1"], "argument --world-size"),
        (["plan", "a.yaml", "--nodes", "two"], "found 'two', expected a number of 1 or more"),
        (["plan", "a.yaml", "--gpu", "h10"], "invalid choice: 'h10'"),
        (["slurm", "a.yaml", "--nodes", "1"], "are required: --time"),
        (["train", "a.yaml", "--fres"], "found '--fres', expected an option"),
        (["--vers"], "--vers"),
        (["doctor", "--hel"], "found '--hel'"),
    ],
)
def test_words_that_are_none(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """Abbreviations too: what they stand for would change with the next option."""
    with pytest.raises(SystemExit) as ended:
        cli.parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
