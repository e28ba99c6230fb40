"""Sizes of tensor parallelism that refusals name, and what a machine without GPUs lets pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made.configs import run_check
from made.models import MOE

from sfpo_megatron import cli
from sfpo_megatron.config.load import ConfigError


@pytest.mark.parametrize("key", ["parallel.tensor", "rollout.tensor_parallel"])
def test_the_sizes_that_a_refusal_names_are_accepted(
    here: Path, model_dir: Callable[..., Path], key: str
) -> None:
    """And no other up to the number of heads."""
    changes = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 390}
    model_dir(**changes)

    def refusal(size: int) -> str:
        try:
            run_check(f"{key}={size}", on_cpu=False)
        except ConfigError as error:
            assert error.key == key, str(error)
            return error.fix
        return ""

    fitting = [size for size in range(1, 13) if not refusal(size)]
    assert fitting == [1, 2]
    assert {refusal(size) for size in range(3, 13)} == {"set it to one of 1, 2"}


def test_what_a_cpu_cannot_do_is_a_warning_where_nothing_starts(
    here: Path, model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A login node checks and plans for GPUs."""
    model_dir(**MOE)
    parted = ("parallel.expert_tensor=2", "parallel.tensor=2", "parallel.sequence=true")
    eight_bits = ("megatron.transformer.fp8=hybrid",)
    at_once = ("rollout.engine_args.max_num_batched_tokens=95",)
    for overrides, words in (
        (parted, "parallel.expert_tensor: found 2, expected 1 on CPU; set it to 1: gloo"),
        (eight_bits, "megatron.transformer.fp8: found hybrid without a CUDA device"),
        (at_once, "found 95 with prompts that are taken at once"),
    ):
        assert any(words in warning for warning in run_check(*overrides, on_cpu=True))
        with pytest.raises(ConfigError) as caught:
            run_check(*overrides, on_cpu=True, for_training=True)
        assert words in str(caught.value)
        assert cli.main(["plan", "run.yaml", *overrides]) == 0
        assert "train, 1 generate" in capsys.readouterr().out


@pytest.mark.parametrize("launched", [False, True])
def test_ranks_without_rollouts_are_a_warning(here: Path, launched: bool) -> None:
    """8 rollouts in a minibatch."""
    of_8 = ("train.prompts_per_step=4", "train.group_size=4", "train.minibatches_per_step=2")

    def warnings(data: int) -> list[str]:
        given = "null" if launched else data
        found = run_check(*of_8, f"parallel.data={given}", world_size=data if launched else None)
        return [warning for warning in found if "parallel.data" in warning]

    assert warnings(8) == []
    assert warnings(9) == [
        "warning: run.yaml: parallel.data: found 9 with 8 rollouts in a minibatch, expected at "
        "most 8: further ranks would have none; lower it, or train.minibatches_per_step"
    ]
