"""Every optimizer mode that SFPO cannot edit is refused with the setting's name.

Not exercised here: that these modes would be wrong (they need CUDA, TransformerEngine or FP8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from harness import DP2, TE1, TP1, on_ranks
from made.bits import all_same_bits, clones

if TYPE_CHECKING:
    from workbench import Workbench

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "megatron.ddp.use_megatron_fsdp": ("ddp_config", {"use_megatron_fsdp": True}),
    "megatron.ddp.fp8_param_gather": ("ddp_config", {"fp8_param_gather": True}),
    "megatron.optimizer.reuse_grad_buf_for_mxfp8_param_ag": (
        "config",
        {"reuse_grad_buf_for_mxfp8_param_ag": True},
    ),
    "megatron.optimizer.overlap_param_gather_with_optimizer_step": (
        "config",
        {"overlap_param_gather_with_optimizer_step": True},
    ),
    "megatron.optimizer.optimizer_cpu_offload": ("config", {"optimizer_cpu_offload": True}),
    "megatron.optimizer.optimizer_cpu_offload with megatron.optimizer.optimizer: sgd": (
        "config",
        {"optimizer_cpu_offload": True, "optimizer": "sgd"},
    ),
    "megatron.optimizer.use_precision_aware_optimizer": (
        "config",
        {"fp16": True, "use_precision_aware_optimizer": True},
    ),
    "megatron.optimizer.main_params_dtype": (
        "config",
        {"main_params_dtype": torch.float16, "use_precision_aware_optimizer": True},
    ),
    "megatron.optimizer.optimizer": ("config", {"optimizer": "muon"}),
}


@on_ranks(TP1, setting=list(REFUSED))
def test_refused_with_its_name(bench: Workbench, setting: str) -> None:
    """The fields are set on Megatron's own config objects, so a renamed field fails here."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from sfpo_megatron.mcore.shards.refused import refuse_unsupported

    optimizer = SimpleNamespace(
        config=OptimizerConfig(optimizer="adam", lr=1e-3),
        ddp_config=DistributedDataParallelConfig(),
    )
    refuse_unsupported(optimizer)  # type: ignore[arg-type]
    owner, fields = REFUSED[setting]
    for field, value in fields.items():
        assert hasattr(getattr(optimizer, owner), field), f"Megatron no longer has {owner}.{field}"
        setattr(getattr(optimizer, owner), field, value)
    expected = {True: "true", torch.float16: "torch.float16", "muon": "muon (NoneType)"}
    (value,) = [value for name, value in fields.items() if setting.split()[0].endswith(f".{name}")]
    with refused(f"{setting}: found {expected[value]}, expected "):
        refuse_unsupported(optimizer)  # type: ignore[arg-type]


@on_ranks(TP1, DP2)
def test_layer_wise_and_muon_classes_are_refused(bench: Workbench) -> None:
    """Megatron 0.16.1 builds Muon under `optimizer: adam`: the classes tell. Under a name as
    Megatron's, because Muon itself needs a package that is not here."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    from sfpo_megatron.mcore.shards import MainParamShards

    policy = bench.policy(ddp={"use_distributed_optimizer": False})
    (member,) = policy.optimizer.chained_optimizers
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer_wise = LayerWiseDistributedOptimizer([member], member.config, groups)
    with refused("megatron.optimizer.use_layer_wise_distributed_optimizer: found LayerWise"):
        MainParamShards(layer_wise)
    member.optimizer.__class__ = type("TensorParallelMuon", (torch.optim.AdamW,), {})
    with refused("megatron.optimizer.optimizer: found adam (TensorParallelMuon), expected adam"):
        MainParamShards(member)


@on_ranks(TP1, TE1, name=["fp8", "fp4"])
def test_formats_that_nothing_here_computes_in(bench: Workbench, name: str) -> None:
    """Not by `check`, which another machine may have run: Megatron would compute in fp32."""
    found = {"fp8": "hybrid", "fp4": "e2m1"}[name]
    with refused(f"megatron.transformer.{name}: found {found}, expected null without Transformer"):
        bench.policy(transformer={name: found, "apply_rope_fusion": False})


@on_ranks(TE1, name=["fp8", "fp4"])
def test_formats_that_were_never_trained_in_are_said_to_be(bench: Workbench, name: str) -> None:
    """A machine that says it has TransformerEngine and a device; once a process."""
    from unittest.mock import patch

    from sfpo_megatron.config.rules.model import model_of
    from sfpo_megatron.host import unverified
    from sfpo_megatron.mcore.settings import transformer_config

    unverified.log_unverified.cache_clear()
    capabilities = dataclasses.replace(bench.capabilities, cuda=True)
    for found, said in ((None, []), ({"fp8": "hybrid", "fp4": "e2m1"}[name], [name.upper()])):
        config = bench.config(
            "qwen2_tied", dtype="bfloat16", transformer={name: found, "apply_rope_fusion": False}
        )
        shape = model_of(config, file="a test")
        with patch.object(unverified.log, "warning") as warning:
            made = transformer_config(shape, config, capabilities)
        assert getattr(made, name) == found
        assert [call.args[1] for call in warning.call_args_list] == [f"{n} training" for n in said]


@on_ranks(TE1)
def test_precision_aware_modes_are_refused_by_policy(bench: Workbench) -> None:
    """Through the whole set-up, with dtypes named as a config file names them."""
    precision_aware = {"use_precision_aware_optimizer": True}
    with refused("megatron.optimizer.use_precision_aware_optimizer: found true"):
        bench.policy(dtype="float16", optimizer=precision_aware)
    with refused("megatron.optimizer.main_params_dtype: found torch.float16"):
        bench.policy(dtype="bfloat16", optimizer=precision_aware | {"main_params_dtype": "float16"})
    with refused("megatron.optimizer.exp_avg_dtype: found 'bfloat', expected the name of a torch"):
        bench.policy(dtype="bfloat16", optimizer=precision_aware | {"exp_avg_dtype": "bfloat"})


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The body raises a ValueError that starts with `message`."""
    try:
        yield
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(f"accepted, expected {message!r}")


@on_ranks(TP1)
def test_unknown_optimizer_class_is_refused(bench: Workbench) -> None:
    from megatron.core.optimizer import OptimizerConfig

    from sfpo_megatron.mcore.shards import MainParamShards

    class Own:
        config = OptimizerConfig(optimizer="adam", lr=1e-3)

    with refused("optimizer: found Own"):
        MainParamShards(Own())  # type: ignore[arg-type]


@on_ranks(TP1, DP2, dtype=["float32", "bfloat16"])
def test_optimizers_without_sharding_are_repositioned(bench: Workbench, dtype: str) -> None:
    """use_distributed_optimizer=false: the same contract on FP32Optimizer and
    Float16OptimizerWithFloat16Params (a null step after the reposition changes nothing)."""
    from sfpo_megatron.sfpo import SlowSnapshot

    policy = bench.policy(dtype=dtype, ddp={"use_distributed_optimizer": False})
    expected = "FP32Optimizer" if dtype == "float32" else "Float16OptimizerWithFloat16Params"
    found = [type(member).__name__ for member in policy.optimizer.chained_optimizers]
    assert found == [expected]
    live = [p for chunk in policy.chunks for p in chunk.parameters()]
    assert sum(t.numel() for t in policy.shards.tensors()) == sum(p.numel() for p in live)
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    slow = clones(policy.shards.tensors())
    run_pass()
    fast = clones(policy.shards.tensors())
    snapshot.reposition(0.8)
    masters = clones(policy.shards.tensors())
    assert all_same_bits(masters, [torch.lerp(s, f, 0.8) for s, f in zip(slow, fast, strict=True)])
    params = clones(live)
    by_size = sorted(m.sum(dtype=torch.float64).item() for m in masters)
    live_sums = sorted(p.sum(dtype=torch.float64).item() for p in params)
    close = 0.0 if dtype == "float32" else 0.5
    assert all(abs(a - b) <= close for a, b in zip(by_size, live_sums, strict=True))
    for group in policy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    run_pass()
    assert all_same_bits(masters, policy.shards.tensors()) and all_same_bits(params, live)
