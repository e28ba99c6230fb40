"""Loading: YAML and overrides into the tree, the round trip, and what is refused, word by word."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfpo_megatron.config.load import ConfigError, dump_config, load_config
from sfpo_megatron.config.tree import RunConfig, TrainConfig

BASE = """\
output_dir: runs/test
model: {path: some/model}
data:
  train:
    - {source: reasoning_gym, task: chain_sum, size: 100}
    - {source: jsonl, path: rows.jsonl}
"""


def load(tmp_path: Path, text: str = "", *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(BASE + text)
    return load_config(path, list(overrides))


def test_defaults_come_from_the_tree(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.train == TrainConfig()
    assert config.data.train[1].path == "rows.jsonl"


def test_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as a string and 1 as an int; lists become tuples."""
    text = "train: {optimizer: {lr: 1e-6, clip_grad: 1, betas: [0, 0.95]}}"
    optimizer = load(tmp_path, text).train.optimizer
    assert (optimizer.lr, optimizer.clip_grad, optimizer.betas) == (1e-6, 1.0, (0.0, 0.95))
    assert isinstance(optimizer.clip_grad, float)


def test_overrides(tmp_path: Path) -> None:
    """Dotted keys, list indices, null, sections that the file does not have, the last one wins."""
    config = load(
        tmp_path,
        "",
        "train.num_steps=5",
        "train.num_steps=7",
        "data.train.0.size=5",
        "train.optimizer.lr=1e-4",
        "parallel.data=null",
        "tracking.sinks=[jsonl]",
        "rollout.engine_args={block_size: 32}",
        "data.prompt_suffix=' a=b'",
    )
    assert config.train.num_steps == 7
    assert config.data.train[0].size == 5
    assert config.train.optimizer.lr == 1e-4
    assert config.parallel.data is None
    assert config.tracking.sinks == ("jsonl",)
    assert config.rollout.engine_args == {"block_size": 32}
    assert config.data.prompt_suffix == " a=b"


def test_dump_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {optimizer: {lr: 1e-7}}\nsfpo: {stop_step: 3}", "seed=3")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@settings(deadline=None, max_examples=60)
@example(lr=1e-7, suffix="a\x85b\r\n'yes'", args={"1e5": 3})
@given(
    lr=st.floats(0, 1, allow_nan=False),
    suffix=st.text(max_size=12),
    args=st.dictionaries(
        st.text(min_size=1, max_size=5), st.integers() | st.booleans(), max_size=3
    ),
)
def test_dump_round_trips_any_value(
    lr: float, suffix: str, args: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Text with quotes, newlines, `yes`, `1e5`; floats to the last bit."""
    folder = tmp_path_factory.mktemp("dump")
    config = load(folder)
    optimizer = dataclasses.replace(config.train.optimizer, lr=lr)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, optimizer=optimizer),
        data=dataclasses.replace(config.data, prompt_suffix=suffix),
        megatron=dataclasses.replace(config.megatron, transformer=args),
    )
    (folder / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(folder / "again.yaml") == config


FILE_CASES = {  # text after BASE -> (key, found, expected, fix)
    "trian: {}": ("trian", "an unknown key", "one of seed, output_dir", "did you mean train?"),
    "train: {num_step: 1}": ("train.num_step", "unknown key", "num_steps", "mean num_steps?"),
    "train: {num_steps: many}": ("train.num_steps", "'many' (str)", "an integer", "correct"),
    "train: {num_steps: 1.5}": ("train.num_steps", "1.5 (float)", "an integer", "correct"),
    "train: {num_steps: true}": ("train.num_steps", "True", "an integer", "correct"),
    "train: {optimizer: {lr: tiny}}": ("train.optimizer.lr", "'tiny'", "finite number", "correct"),
    "train: {optimizer: {lr: .inf}}": ("train.optimizer.lr", "inf", "finite number", "correct"),
    # Doubles that float32 does not have: torch raised where the loss was computed.
    "objective: {clip_high: 1e39}": (
        "objective.clip_high", "1e+39", "below 3.4e+38, as float32 has", "a smaller one"),
    "sfpo: {entropy_zscore_threshold: -3.5e38}": (
        "sfpo.entropy_zscore_threshold", "-3.5e+38", "below 3.4e+38", "a smaller one"),
    "sfpo: {entropy_window: 1000001}": (
        "sfpo.entropy_window", "1000001", "[2, 1e+06]", "move entropy_window"),
    "train: {control_timeout_s: 0.5}": (
        "train.control_timeout_s", "0.5", "a number >= 1", "set control_timeout_s to 1 or more"),
    "train: {optimizer: {betas: [0.9]}}": (
        "train.optimizer.betas", "[0.9]", "a list of 2", "correct"),
    "sfpo: {latch: 1}": ("sfpo.latch", "1 (int)", "true or false", "write true or false"),
    "sfpo: {trigger: one-sided}": (
        "sfpo.trigger", "'one-sided'", "one of one_sided, two_sided", "mean one_sided?"),
    "train: [1]": ("train", "[1]", "a section", "give it keys"),
    "train:": ("train", "null", "a section", "give it keys"),
    "tracking: {sinks: console}": ("tracking.sinks", "'console'", "a list", "[console]"),
    "tracking: {sinks: [comet]}": ("tracking.sinks.0", "'comet'", "console, jsonl", "choose one"),
    "seed: 4294967296": ("seed", "4294967296", "a number below 2**32", "take a smaller seed"),
    "debug: {save_rollouts: " + 256 * "a" + "}": (
        "debug.save_rollouts", "of 256 bytes, with a name of 256",
        "at most 3500 bytes, and 255 in a name", "choose a shorter one"),
    "debug: {train_only: " + 128 * "é" + "/x}": (
        "debug.train_only", "with a name of 256", "255 in a name", "choose a shorter one"),
    "seed: 1\nseed: 2": ("seed", "the key twice", "once", "remove one"),
    "train: {num_steps: 0}": ("train.num_steps", "0", "a number >= 1", "set num_steps to 1"),
    "sfpo: {trajectory: predicted, num_fast_passes: 1}": (
        "sfpo.num_fast_passes", "1", "2 or more with trajectory: predicted", "trajectory to real"),
    "sfpo: {trajectory: predicted, snapshot: host}": (
        "sfpo.snapshot", "host", "device with trajectory: predicted", "set snapshot to device"),
    "sfpo: {entropy_patience: 0}": (
        "sfpo.entropy_patience", "0", "a number >= 1", "set entropy_patience to 1"),
    "sfpo: {entropy_relative_threshold: 0}": (
        "sfpo.entropy_relative_threshold", "0", "a number > 0", "above zero"),
    "sfpo: {stop_step: 20, entropy_warmup_steps: 20}": (
        "sfpo.entropy_warmup_steps", "20", "fewer than stop_step (20)", "set stop_step to null"),
    "sfpo: {alpha: 1.5}": ("sfpo.alpha", "1.5", "a number in [0, 1]", "move alpha"),
    "train: {optimizer: {betas: [0.9, 1]}}": (
        "train.optimizer.betas", "(0.9, 1.0)", "two numbers in [0, 1)", "use [0.9, 0.999]"),
    "train: {group_size: 1}": ("train.group_size", "1", ">= 2", "set group_size to 2"),
    "train: {prompts_per_step: 3}": (
        "train.prompts_per_step", "3", "a multiple of minibatches_per_step (2)", "change one"),
    "parallel: {sequence: true}": (
        "parallel.sequence", "True", "false when tensor is 1", "parallel.tensor=2"),
    "debug: {rollout_only: true, train_only: x}": (
        "debug.rollout_only", "True", "false with train_only", "unset one"),
}  # fmt: skip


@pytest.mark.parametrize("text", FILE_CASES, ids=lambda text: text.replace("\n", " "))
def test_file_errors(tmp_path: Path, text: str) -> None:
    key, *parts = FILE_CASES[text]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    error = caught.value
    assert error.key == key
    assert str(error).startswith(f"{tmp_path / 'run.yaml'}: {key}: found ")
    for part, said in zip(parts, (error.found, error.expected, error.fix), strict=True):
        assert part in said
        assert said in str(error)
    last_line = (BASE + text).count("\n") + 1
    assert str(error).endswith(f"(line {last_line})")


OVERRIDE_CASES = {
    "train.num_step=3": ("train.num_step", "an unknown key", "did you mean num_steps?"),
    "trian.num_steps=3": ("trian", "an unknown key", "did you mean train?"),
    "train.num_steps=x": ("train.num_steps", "'x' (str)", "correct the value"),
    "train.num_steps": ("train.num_steps", "no dotted key with a value", "like train.num_steps=10"),
    "train..x=1": ("train..x=1", "no dotted key", "like train.num_steps=10"),
    "data.train.5.size=1": ("data.train.5.size", "index '5' into a list of 2", "use an index"),
    "data.train.x.size=1": ("data.train.x.size", "index 'x'", "use an index"),
    "output_dir.x=1": ("output_dir.x", "output_dir = 'runs/test'", "drop what follows"),
    "output_dir=7": ("output_dir", "7 (int)", "write it in quotes"),
    "sfpo.alpha=2": ("sfpo.alpha", "2.0", "move alpha"),
    "seed=[1": ("seed", "'[1'", "quote it"),
    "train=3": ("train", "3 (int)", "give it keys"),
}


COLUMNS = {
    "{prompt: no}": ("prompt", "False, which YAML makes of no", "write it in quotes: prompt: 'no'"),
    "{answer: 1}": ("answer", "1 (int)", "write it in quotes: answer: '1'"),
    "{system: null}": ("system", "null", "give system a value"),
    "{prompt: [q]}": ("prompt", "['q']", "write one text"),
}


@pytest.mark.parametrize("columns", COLUMNS)
def test_values_of_a_section_of_texts_are_texts(tmp_path: Path, columns: str) -> None:
    name, found, fix = COLUMNS[columns]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"    - {{source: jsonl, path: a.jsonl, columns: {columns}}}\n")
    assert f"data.train.2.columns.{name}: found {found}, expected a string" in str(caught.value)
    assert fix in caught.value.fix
    config = load(tmp_path, "    - {source: jsonl, path: a.jsonl, columns: {prompt: 'no'}}\n")
    assert config.data.train[2].columns == {"prompt": "no"}


@pytest.mark.parametrize("override", OVERRIDE_CASES)
def test_override_errors_name_the_command_line(tmp_path: Path, override: str) -> None:
    key, found, fix = OVERRIDE_CASES[override]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "", override)
    assert str(caught.value).startswith(f"command line: {key}: found ")
    assert found in caught.value.found
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: m}\noutput_dir: x", "data: found nothing, expected a section of keys"),
        ("output_dir: x\ndata: {train: []}\nmodel: {path: m}", "data.train: found [], expected at"),
        ("output_dir: x\nmodel: {}\ndata: {}", "model.path: found nothing, expected a string"),
        ("- a\n- b", "(top level): found ['a', 'b'], expected a mapping"),
        ("a: {b", "(file): found "),
        ("a: !!python/object:os.system {}", "a: found an unknown key"),
        ("seed: !!python/name:os.system x", "(file): found could not determine a constructor"),
        ("megatron: &a {transformer: {x: *a}}", "found an alias to itself"),
        ("", "output_dir: found nothing"),
    ],
)
def test_whole_file_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.yaml", ""])
def test_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a YAML file; correct the path"):
        load_config(tmp_path / name)


def test_dump_is_plain_yaml(tmp_path: Path) -> None:
    """No Python tags: any YAML reader takes it."""
    assert yaml.safe_load(dump_config(load(tmp_path)))["model"]["path"] == "some/model"
