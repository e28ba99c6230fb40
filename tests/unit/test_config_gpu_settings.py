"""What `check` recommends on a GPU, where a setting is left at its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.rules.gpu_settings import gpu_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
CHOSEN: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "rollout": {"gpu_memory_utilization": 0.9},
    "megatron": {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
}
FOR_GPUS = sorted(
    file
    for file in EXAMPLES.glob("*/*.yaml")
    if (file.parent / "model").is_dir() and file.parent.name != "smollm2"
)


def keys(*, on_cpu: bool = False, **sections: Any) -> list[str]:
    found = list(gpu_settings(run_config(**sections), on_cpu))
    assert {problem.level for problem in found} <= {"warning"}
    return [problem.key for problem in found]


def test_all_that_is_left_unset() -> None:
    assert keys(parallel={"data": 2}) == [
        "model.dtype",
        "rollout.gpu_memory_utilization",
        "megatron.ddp.overlap_grad_reduce",
        "megatron.ddp.overlap_param_gather",
    ]
    assert keys(parallel={"data": 2}, on_cpu=True) == []


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, []),
        ({"rollout": {"gpu_memory_utilization": 0.5}}, []),
        ({"rollout": {"placement": "colocated"}}, []),
        ({"megatron": {}, "parallel": {"data": 1}}, []),
        ({"megatron": {"ddp": {"overlap_grad_reduce": False, "overlap_param_gather": False}}}, []),
        (
            {"megatron": {"ddp": {"use_distributed_optimizer": False}}},
            ["megatron.ddp.overlap_grad_reduce"],
        ),
        ({"model": {"dtype": "float16"}}, []),
    ],
)
def test_what_is_set_is_meant(changes: dict[str, Any], left: list[str]) -> None:
    assert keys(**({"parallel": {"data": 2}} | CHOSEN | changes)) == left


@pytest.mark.parametrize("file", FOR_GPUS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_examples_for_gpus_have_it(file: Path) -> None:
    assert list(gpu_settings(load_config(file), False)) == []


def test_there_are_examples_for_gpus() -> None:
    assert len(FOR_GPUS) > 10
