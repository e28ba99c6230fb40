"""Optimizer, data-parallel and recompute settings that contradict one another: `check` says so, and
of what Megatron's own dataclasses assert it says neither more nor less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made.configs import run_check
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from sfpo_megatron.config.load import ConfigError

Settings = dict[str, Any]
AWARE = "use_precision_aware_optimizer"
BF16 = "model.dtype=bfloat16"
BY_MEGATRON: tuple[tuple[str, Settings, Settings, str | None], ...] = (
    # megatron.optimizer, of them or of megatron.ddp; key that is refused
    *(
        ("optimizer", {name: "bfloat16"}, {}, f"optimizer.{name}")
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    ),
    ("optimizer", {"exp_avg_dtype": "float32"}, {}, None),
    ("optimizer", {AWARE: True, "optimizer": "sgd"}, {}, f"optimizer.{AWARE}"),
    ("optimizer", {AWARE: True}, {"use_distributed_optimizer": False}, f"optimizer.{AWARE}"),
    ("optimizer", {AWARE: True}, {}, f"optimizer.{AWARE}"),  # there is no TransformerEngine
    ("ddp", {}, {"reuse_grad_buf_for_mxfp8_param_ag": True}, "ddp.reuse_grad_buf_for_mxfp8_param"),
)


def refused(given: list[str], **arguments: Any) -> str | None:
    try:
        run_check(*given, **arguments)
    except ConfigError as error:
        return error.key
    return None


def override(section: str, settings: Settings) -> str:
    return f"megatron.{section}={json.dumps(settings)}"


@pytest.mark.parametrize("case", BY_MEGATRON, ids=str)
def test_what_megatron_asserts_of_the_optimizer(
    here: Path, case: tuple[str, Settings, Settings, str | None]
) -> None:
    """Not exercised here: TransformerEngine of a version that lacks an argument."""
    section, given, ddp, key = case
    settings = {k: getattr(torch, v) if "dtype" in k else v for k, v in given.items()}
    sharded = ddp.get("use_distributed_optimizer", True)
    asserts = False
    try:
        if section == "ddp":
            DistributedDataParallelConfig(**ddp)
        else:
            OptimizerConfig(use_distributed_optimizer=sharded, lr=1e-6, **settings)
    except (AssertionError, RuntimeError, TypeError):  # the last: no version of TransformerEngine
        asserts = True
    assert asserts is (key is not None)
    found = refused([override("optimizer", given), override("ddp", ddp), BF16], for_training=True)
    assert found is None if key is None else str(found).startswith(f"megatron.{key}")


def test_offload_needs_transformer_engine_beside_it(here: Path) -> None:
    """Megatron-Core 0.16 asks for its version; from 0.19 on it would do without."""
    both = override("optimizer", {AWARE: True, "optimizer_cpu_offload": True})
    assert refused([both, BF16], for_training=True) == f"megatron.optimizer.{AWARE}"


def test_a_plan_is_made_without_transformer_engine(here: Path) -> None:
    (warning,) = run_check(override("optimizer", {AWARE: True}), BF16)
    assert "no TransformerEngine in this Python" in warning


OFFLOAD = {"optimizer_cpu_offload": True}
CONTRADICTIONS: dict[str, tuple[str, str, str, Settings, Settings]] = {
    # key, found, fix, megatron.optimizer, megatron.ddp
    "shards of SGD": (
        "ddp.use_distributed_optimizer", "true with megatron.optimizer.optimizer: sgd",
        "use_distributed_optimizer=false", {"optimizer": "sgd"}, {}),
    "offload without shards": (
        "optimizer.optimizer_cpu_offload", "use_distributed_optimizer: false", "has copied",
        OFFLOAD, {"use_distributed_optimizer": False}),
    "offload of Adam with L2": (
        "optimizer.optimizer_cpu_offload", "decoupled_weight_decay: false", "remove one",
        OFFLOAD | {"decoupled_weight_decay": False}, {}),
    "a gather of no shards": (
        "ddp.overlap_param_gather", "True with megatron.ddp.use_distributed_optimizer: false",
        "remove one", {}, {"use_distributed_optimizer": False, "overlap_param_gather": True}),
    "instances of no shards": (
        "ddp.num_distributed_optimizer_instances", "2 with megatron.ddp.use_distributed",
        "remove one", {},
        {"use_distributed_optimizer": False, "num_distributed_optimizer_instances": 2}),
    "instances that do not divide": (
        "ddp.num_distributed_optimizer_instances", "3", "another number", {},
        {"num_distributed_optimizer_instances": 3}),
    "no instances": (
        "ddp.num_distributed_optimizer_instances", "0", "another number", {},
        {"num_distributed_optimizer_instances": 0}),
    "another optimizer than the buffers are for": (
        "optimizer.use_distributed_optimizer", "False", "set megatron.ddp.use_distributed",
        {"use_distributed_optimizer": False}, {}),
    "a dtype by its short name": (
        "optimizer.exp_avg_dtype", "'bf16'", "correct the value",
        {AWARE: True, "exp_avg_dtype": "bf16"}, {}),
    "a buffer of gradients that params share": (
        "ddp.reuse_grad_buf_for_mxfp8_param_ag", "True", "share storage", {},
        {"reuse_grad_buf_for_mxfp8_param_ag": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(here: Path, name: str) -> None:
    key, found, fix, optimizer, ddp = CONTRADICTIONS[name]
    given = [override("optimizer", optimizer), override("ddp", ddp), BF16, "parallel.data=4"]
    with pytest.raises(ConfigError) as caught:
        run_check(*given)
    assert caught.value.key == f"megatron.{key}"
    assert found in str(caught.value) and fix in str(caught.value)


def test_a_mean_of_gradients_that_tokens_divide(here: Path) -> None:
    mean = override("ddp", {"average_in_collective": True})
    assert refused([mean]) is None
    per_token = override("transformer", {"calculate_per_token_loss": True})
    assert refused([mean, per_token]) == "megatron.ddp.average_in_collective"


FULL = {"recompute_granularity": "full"}
RECOMPUTE: tuple[Settings, ...] = (
    FULL,
    FULL | {"recompute_method": "uniform"},
    FULL | {"recompute_num_layers": 1},
    FULL | {"recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "selective", "recompute_num_layers": 1},
    {"recompute_granularity": "selective", "recompute_method": "uniform"},
    {"cpu_offloading": True, "cpu_offloading_num_layers": 1, "recompute_granularity": "selective"},
    {"cpu_offloading": True, "cpu_offloading_num_layers": 1},
)


@pytest.mark.parametrize("settings", RECOMPUTE, ids=str)
def test_what_megatron_asserts_of_recompute(here: Path, settings: Settings) -> None:
    try:
        TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **settings)
        asserts = False
    except ValueError:
        asserts = True
    key = refused([override("transformer", settings)])
    assert (key is not None) is asserts, key


def test_recompute_without_granularity_is_a_warning(here: Path) -> None:
    warnings = run_check("megatron.transformer={recompute_method: uniform}")
    assert ["so that nothing is recomputed" in warning for warning in warnings] == [True]


def test_learning_rates_that_adam_cannot_mean(here: Path) -> None:
    def said(*overrides: str) -> list[str]:
        return [line for line in run_check(*overrides) if ".lr: " in line]

    assert said("train.optimizer.lr=0.1", "sft.lr=0.1") == []
    (line,) = said("train.optimizer.lr=5")
    assert line == (
        "warning: run.yaml: train.optimizer.lr: found 5, expected at most 0.1 with Adam, which "
        "moves every weight by about as much; write a smaller one, such as 1.0e-6"
    )
    assert len(said("train.optimizer.lr=1", "sft.lr=1.0")) == 2
    sgd = (
        override("optimizer", {"optimizer": "sgd"}),
        "megatron.ddp.use_distributed_optimizer=false",
    )
    assert said("train.optimizer.lr=1", *sgd) == []
