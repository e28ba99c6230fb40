"""What Megatron-Core would refuse once the run has started, `check` refuses: each was a run that
ended at its model or its optimizer, or never came to an end.

Not exercised: the rest of what its configs assert.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_check, run_config
from made.models import MOE
from made.rope_forms import YARN

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules import low_precision
from sfpo_megatron.config.rules.megatron_demands import loop
from sfpo_megatron.errors import InputError

FULL = {"recompute_granularity": "full"}
UNIFORM = FULL | {"recompute_method": "uniform"}
SELECTIVE = {"recompute_granularity": "selective"}
REFUSED: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    # section, settings, key: found, fix
    ("transformer", FULL, "found full without recompute_method", "recompute_method: uniform"),
    ("transformer", UNIFORM, "full without recompute_num_layers", "recompute_num_layers: 1"),
    # Of 0 layers at a time it recomputes for ever.
    ("transformer", UNIFORM | {"recompute_num_layers": 0}, "layers: found 0, expected 1", "1"),
    ("transformer", UNIFORM | {"recompute_num_layers": -1}, "layers: found -1", "1"),
    ("transformer", SELECTIVE | {"recompute_num_layers": 1}, "layers: found 1 with", "remove it"),
    ("optimizer", {"exp_avg_dtype": "bfloat16"}, "exp_avg_dtype: found bfloat16 without", "true"),
    ("optimizer", {"main_grads_dtype": "bfloat16"}, "main_grads_dtype: found bfloat16", "true"),
    ("optimizer", {"main_params_dtype": "float16"}, "main_params_dtype: found float16", "remove"),
    ("ddp", {"num_distributed_optimizer_instances": 2}, "found 2, expected a divisor", "another"),
    ("ddp", {"num_distributed_optimizer_instances": 0}, "found 0, expected a divisor", "another"),
    ("ddp", {"num_distributed_optimizer_instances": None}, "found null", "correct the value"),
    ("optimizer", {"hysteresis": None}, "hysteresis: found null, expected int", "correct"),
    ("optimizer", {"main_params_dtype": "x"}, "'x' (str), expected torch.dtype", "correct"),
    ("optimizer", {"exp_avg_dtype": True}, "True (bool), expected torch.dtype", "correct"),
    ("optimizer", {"exp_avg_dtype": None}, "found null, expected torch.dtype", "correct"),
    ("optimizer", {"loss_scale": -1.0}, "loss_scale: found -1.0, expected a number > 0", "raise"),
    ("transformer", {"enable_cuda_graph": True}, "no CUDA graphs: packed", "remove it"),
    ("transformer", {"cuda_graph_impl": "local"}, "found local, expected no CUDA", "remove it"),
    ("transformer", {"num_layers_in_first_pipeline_stage": 1}, "pipeline 1", "remove it"),
    ("transformer", {"num_layers_in_last_pipeline_stage": 1}, "pipeline 1", "remove it"),
    # A TypeError in the first pass; in TransformerEngine's first layer; in the first schedule.
    ("transformer", {"overlap_moe_expert_parallel_comm": True}, "plans the layers", "remove it"),
    ("transformer", {"tp_comm_overlap": True}, "buffers are of one size", "remove it"),
    ("transformer", {"fused_single_qkv_rope": True}, "takes no packs", "remove it"),
    ("transformer", {"hybrid_context_parallel": True}, "own data loader", "remove it"),
    ("transformer", {"hierarchical_context_parallel_sizes": [2, 2]}, "null: its groups", "remove"),
    ("transformer", {"init_model_with_meta_device": True}, "only Megatron-FSDP", "remove it"),
)

DISPATCHER, BALANCING = "moe_token_dispatcher_type", "moe_router_load_balancing_type"
HYBRID = {DISPATCHER: "flex", "moe_flex_dispatcher_backend": "hybridep"}
OF_MODEL: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # key, found and expected; settings; the model's config.json
    "gathered_tokens": (
        DISPATCHER,
        "found allgather with parallel.expert 2, expected alltoall",
        {DISPATCHER: "allgather"},
        MOE,
    ),
    "dispatched_tokens": (
        DISPATCHER,
        "found flex over hybridep with parallel.expert 2, expected alltoall",
        HYBRID,
        MOE,
    ),
    "a_bias_of_the_trainer": (
        BALANCING,
        "found quantile_balancing, expected none, aux_loss",
        {BALANCING: "quantile_balancing"},
        MOE,
    ),
    "fused_rope_without_its_factor": (
        "apply_rope_fusion",
        "found true with a model of attention factor 1.139, expected false",
        {"apply_rope_fusion": True},
        {"rope_parameters": YARN},
    ),
}


@pytest.mark.parametrize("name", OF_MODEL)
def test_refused_of_a_model(here: Path, model_dir: Callable[..., Path], name: str) -> None:
    """Unequal packs, tokens routed otherwise than by the engine, embeddings turned otherwise."""
    key, said, settings, model = OF_MODEL[name]
    for file in (here / "model").iterdir():
        file.unlink()
    model_dir(**model)
    ranks = ("parallel.data=2", "parallel.expert=2") if model is MOE else ()
    with pytest.raises(ConfigError) as caught:
        run_check(f"megatron.transformer={json.dumps(settings)}", *ranks)
    assert caught.value.key == f"megatron.transformer.{key}" and said in str(caught.value)
    assert "remove it" in caught.value.fix or "choose another" in caught.value.fix


@pytest.mark.parametrize(("section", "settings", "found", "fix"), REFUSED)
def test_refused(here: Path, section: str, settings: dict[str, Any], found: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_check(f"megatron.{section}={json.dumps(settings)}")
    error = caught.value
    assert error.key.startswith("megatron.") and found in str(error) and fix in error.fix


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"initial_loss_scale": 0.0}, "initial_loss_scale: found 0.0, expected a number > 0"),
        ({"min_loss_scale": 0.0}, "min_loss_scale: found 0.0"),
        ({"loss_scale_window": 0.0}, "loss_scale_window: found 0.0"),
        ({"hysteresis": 0}, "hysteresis: found 0"),
        ({"min_loss_scale": 65537.0}, "found 65537, expected at most initial_loss_scale (65536)"),
        ({"min_loss_scale": 2.0, "initial_loss_scale": 1.0}, "at most initial_loss_scale (1)"),
    ],
)
def test_a_scale_that_moves(here: Path, settings: dict[str, Any], found: str) -> None:
    """It is float16's alone, unless it is constant."""
    given = f"megatron.optimizer={json.dumps(settings)}"
    with pytest.raises(ConfigError) as caught:
        run_check(given, "model.dtype=float16")
    assert found in str(caught.value)
    assert run_check(given) == []
    constant = f"megatron.optimizer={json.dumps(settings | {'loss_scale': 8.0})}"
    assert run_check(constant, "model.dtype=float16") == []


def test_a_scale_that_moves_overflows_on_its_way(here: Path) -> None:
    check, half = "megatron.ddp.check_for_nan_in_grad=true", "model.dtype=float16"
    with pytest.raises(ConfigError) as caught:
        run_check(check, half)
    assert caught.value.key == "megatron.ddp.check_for_nan_in_grad"
    assert run_check(check) == [] == run_check(check, half, "megatron.optimizer.loss_scale=8")


def test_a_step_that_nobody_captures() -> None:
    """The rule itself refuses: the setting is megatron-core 0.19's."""
    (problem,) = loop(run_config(megatron={"optimizer": {"optimizer_cuda_graph": True}}))
    assert problem.key == "megatron.optimizer.optimizer_cuda_graph"
    assert "false: Megatron-LM's training script captures" in problem.expected


def test_groups_of_microbatches(here: Path) -> None:
    """No schedule can be made of fewer than there are stages; `mcore.batches` makes whole groups of
    more."""
    name = "megatron.transformer.microbatch_group_size_per_vp_stage"
    interleaved = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.dtype=float32")
    with pytest.raises(ConfigError) as caught:
        run_check(f"{name}=1", *interleaved)
    assert caught.value.key == name and "1 with parallel.pipeline 2" in caught.value.found
    for fine in ((f"{name}=4", *interleaved), (f"{name}=1", "parallel.pipeline=2")):
        run_check(*fine)


def test_shards_of_lower_precision(here: Path) -> None:
    aware = "megatron.optimizer.use_precision_aware_optimizer=true"
    with pytest.raises(ConfigError, match=r"aware_optimizer: found true with .*optimizer: false"):
        run_check(aware, "megatron.ddp.use_distributed_optimizer=false")


@pytest.mark.parametrize(
    "settings",
    [
        UNIFORM | {"recompute_num_layers": 1},
        FULL | {"recompute_method": "block", "recompute_num_layers": 3},
        SELECTIVE,
        SELECTIVE | {"recompute_modules": ["mlp"]},
        {"recompute_num_layers": None},
    ],
)
def test_recompute_that_works(here: Path, settings: dict[str, Any]) -> None:
    assert run_check(f"megatron.transformer={json.dumps(settings)}", for_training=True) == []


def test_instances_of_the_ranks(here: Path) -> None:
    two = "megatron.ddp.num_distributed_optimizer_instances=2"
    assert not [w for w in run_check(two, "parallel.data=4") if "instances" in w]
    assert "null with no ranks" in run_check(two, "parallel.data=null")[0]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.transformer_impl=te", "model.transformer_impl"),
        ("megatron.transformer.cpu_offloading=true", "megatron.transformer.cpu_offloading"),
        (
            "megatron.transformer={recompute_granularity: selective, "
            "recompute_modules: [mlp, layernorm]}",
            "megatron.transformer.recompute_modules",
        ),
    ],
)
def test_without_transformer_engine(
    here: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    """A warning on a login node, which may have none where the job has one."""
    (warning,) = run_check(override)
    assert any(f"{key}: found {found}, and no" in warning for found in ("te", "true", "layernorm"))
    assert "no TransformerEngine in this Python" in warning and "install gpu" in warning
    with pytest.raises(ConfigError, match="no TransformerEngine"):
        run_check(override, for_training=True)
    monkeypatch.setattr(low_precision, "find_spec", lambda name: name)
    assert run_check(override, for_training=True) == []


def test_offload_without_a_device(here: Path) -> None:
    off = ("megatron.optimizer.optimizer_cpu_offload=true", "model.dtype=bfloat16")
    (warning,) = run_check(*off, on_cpu=True)
    assert "optimizer_cpu_offload: found true without a CUDA device" in warning
    with pytest.raises(ConfigError, match="the optimizer is in host memory; remove it here"):
        run_check(*off, on_cpu=True, for_training=True)
    assert not [w for w in run_check(*off, on_cpu=False) if "offload" in w]


@dataclass
class Picky:
    """In the place of a config of Megatron's."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("sizes\n  are above 0")


def test_what_only_megatron_knows_ends_the_run_in_a_line() -> None:
    from sfpo_megatron.mcore.settings import overridden

    assert overridden("ddp", Picky, {"size": 0}, {"size": 2}).size == 2
    with pytest.raises(InputError) as caught:
        overridden("ddp", Picky, {}, {"size": 0})
    assert str(caught.value) == (
        "megatron.ddp: found {'size': 0}, expected what Picky of this megatron-core takes "
        "(ValueError: sizes are above 0); correct the settings"
    )
    with pytest.raises(InputError, match=r"megatron\.ddp\.width: found a name that Picky of"):
        overridden("ddp", Picky, {}, {"width": 1})
    with pytest.raises(ValueError, match="sizes\n"):  # ours
        overridden("ddp", Picky, {"size": 0}, {})
