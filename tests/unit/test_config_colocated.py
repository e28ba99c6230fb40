"""`rollout.placement: colocated`: what it does not go together with is refused, by key and fix."""

from __future__ import annotations

import pytest
from made.configs import run_check

from sfpo_megatron import cli
from sfpo_megatron.config.load import ConfigError

pytestmark = pytest.mark.usefixtures("here")
COLOCATED = "rollout.placement=colocated"
CASES: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    # key, found, expected, fix, overrides
    "async": (
        "rollout.async_steps", "1 with rollout.placement: colocated", "0", "dedicated",
        ("rollout.async_steps=1",)),
    "too_few": (
        "rollout.num_engines", "1 (x tensor_parallel 1)", "all 2 devices",
        "set rollout.num_engines=2", ("parallel.data=2",)),
    "too_many_data_null": (
        "rollout.num_engines", "4 (x tensor_parallel 2)", "all 4 devices",
        "set rollout.num_engines=2",
        ("parallel.data=null", "rollout.num_engines=4", "rollout.tensor_parallel=2")),
    "odd": (
        "rollout.num_engines", "1 (x tensor_parallel 2)", "all 3 devices",
        "change rollout.tensor_parallel",
        ("parallel.data=3", "rollout.tensor_parallel=2", "train.group_size=3")),
    "nccl": (
        "refit.transport", "nccl_stages with rollout.placement: colocated",
        "without a communicator", "refit.transport: auto", ("refit.transport=nccl_stages",)),
    "cuda_graphs": (
        "megatron.transformer.cuda_graph_impl", "local with", "nothing that keeps addresses",
        "remove it", ("megatron.transformer.cuda_graph_impl=local",)),
    "user_buffers": (
        "megatron.ddp.nccl_ub", "True with", "nothing that keeps addresses", "remove it",
        ("megatron.ddp.nccl_ub=true",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    key, found, expected, fix, overrides = CASES[name]
    with pytest.raises(ConfigError) as caught:
        run_check(
            COLOCATED, *overrides, world_size=4 if "parallel.data=null" in overrides else None
        )
    error = caught.value
    assert error.key == key and found in error.found
    assert expected in error.expected and fix in error.fix


def test_accepted() -> None:
    assert run_check(COLOCATED, for_training=True) == []
    layout = ("parallel.data=2", "parallel.tensor=2", "rollout.num_engines=2")
    assert run_check(COLOCATED, *layout, "rollout.tensor_parallel=2", world_size=4) == []


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_colocated_engines_refuse_expandable_segments(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512, expandable_segments:True")
    assert run_check() == []
    with pytest.raises(ConfigError, match="sleep mode cannot free such segments") as caught:
        run_check(COLOCATED)
    assert caught.value.key == "rollout.placement" and name in caught.value.found
    monkeypatch.setenv(name, "expandable_segments:False")
    assert run_check(COLOCATED) == []


def test_an_evaluation_of_a_colocated_config_has_no_trainer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its engines are not counted against the ranks: what is missing is the data."""
    overrides = [COLOCATED, "parallel.data=2", "rollout.num_engines=2", "data.eval=[]"]
    assert cli.main(["eval", "run.yaml", *overrides]) == 2
    assert "data.eval" in capsys.readouterr().err
