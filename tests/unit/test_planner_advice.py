"""What `plan` advises where a layout does not fit: it runs when it is pasted after the command."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from made.configs import write_run

from sfpo_megatron.cli import main
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config

ROOT = Path(__file__).parents[2]
SHORT = ("rollout.max_prompt_tokens=1024", "rollout.max_response_tokens=3000")
RECOMPUTED = (
    "megatron.transformer={num_layers_in_first_pipeline_stage: 14, recompute_modules: [mlp], "
    "recompute_granularity: selective, moe_router_dtype: fp32}"
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "context parallel": (
        "qwen2.5-math-7b",
        (
            *SHORT,
            "parallel.data=2",
            "parallel.tensor=1",
            "parallel.sequence=false",
            "parallel.context=4",
            "train.max_tokens_per_microbatch=4096",
        ),
    ),
    "virtual stages": (
        "llama-3.1-70b",
        (
            "parallel={data: 1, pipeline: 4, virtual_pipeline: 5}",
            "rollout={placement: colocated, num_engines: 1, tensor_parallel: 4}",
            "megatron.transformer={}",
        ),
    ),
    "settings that go": (
        "llama-3.1-70b",
        (
            "parallel={data: 2, pipeline: 4}",
            "rollout={placement: colocated, num_engines: 2, tensor_parallel: 4}",
            RECOMPUTED,
        ),
    ),
    "experts": (
        "qwen3-30b-a3b",
        (
            "parallel={data: 8, expert: 1, expert_tensor: 1}",
            "rollout.placement=colocated",
            "rollout.tensor_parallel=4",
            "rollout.num_engines=2",
        ),
    ),
}


def planned(name: str, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", f"examples/{name}/config.yaml", *overrides]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("case", CASES)
def test_what_is_advised_runs(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    name, overrides = CASES[case]
    lines = planned(name, overrides, capsys).splitlines()
    assert "does not fit: stage" in lines[-2], lines
    where, _, advice = lines[-1].partition(" GiB: ")
    again = (*overrides, *shlex.split(advice))
    file = f"examples/{name}/config.yaml"
    check_config(load_config(file, list(again)), file=file, only_reads=True)
    found = planned(name, again, capsys)
    assert "does not fit: stage" not in found
    total = next(line for line in found.splitlines() if line.startswith("total  "))  # of memory
    needed = max(float(cell) for cell in total.split()[1:])
    assert needed == pytest.approx(float(where.rpartition(" ")[2]), abs=0.06)


def test_what_has_no_room_for_a_rollout_is_not_advised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Microbatches of 1100 tokens hold one of 4024 over four context-parallel ranks alone."""
    monkeypatch.chdir(ROOT)
    name, overrides = CASES["context parallel"]
    short = (*overrides, "train.max_tokens_per_microbatch=1100")
    assert planned(name, short, capsys).splitlines()[-1] == (
        "no layout is advised: without context parallelism a microbatch has no room for one "
        "rollout; raise train.max_tokens_per_microbatch to 4024, or parallel.context"
    )


def test_a_layout_of_no_number_of_gpus_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one node leaves the trainer, where no nodes are given, is not enough for the experts."""
    monkeypatch.chdir(ROOT)
    layout = "parallel={data: null, tensor: 1, expert: 16}"
    command = ["plan", "examples/qwen3-30b-a3b/config.yaml", layout]
    assert main(command) == 2
    assert "parallel.expert: found 16" in capsys.readouterr().err
    assert main([*command, "--nodes", "4"]) == 0
    assert "16 h100-80gb train, 16 generate: 4 nodes" in capsys.readouterr().out


def test_advice_on_idle_gpus_can_be_followed(
    model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colocated engines have to grow with the trainer, or the config is refused."""
    run = write_run(
        tmp_path,
        output_dir=str(tmp_path / "out"),
        model={"path": str(model_dir(weights=False)), "dtype": "bfloat16"},
        parallel={"data": 4, "tensor": 2},
        rollout={"placement": "colocated", "num_engines": 4, "tensor_parallel": 2},
    )
    assert main(["plan", str(run), "--nodes", "2"]) == 0
    assert (
        "8 of the 16 GPUs would stay idle; set parallel.data to null, which takes what is left, "
        "and rollout.num_engines to 8, or ask for 1 node\n"
    ) in capsys.readouterr().out
    advice = ["parallel.data=null", "rollout.num_engines=8"]
    assert main(["plan", str(run), "--nodes", "2", *advice]) == 0
    assert "idle" not in capsys.readouterr().out
