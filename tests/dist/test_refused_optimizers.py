"""Every optimizer mode that SFPO cannot edit is refused with the setting's name.

Not exercised here: that these modes would be wrong (they need CUDA, TransformerEngine or FP8).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from harness import DP2, TP1, on_ranks

if TYPE_CHECKING:
    from workbench import Workbench

REFUSED = {
    "megatron.optimizer.use_precision_aware_optimizer": ("config", "use_precision_aware_optimizer"),
    "megatron.optimizer.optimizer_cpu_offload": ("config", "optimizer_cpu_offload"),
    "megatron.optimizer.reuse_grad_buf_for_mxfp8_param_ag": (
        "config",
        "reuse_grad_buf_for_mxfp8_param_ag",
    ),
    "megatron.ddp.fp8_param_gather": ("ddp_config", "fp8_param_gather"),
    "megatron.ddp.use_megatron_fsdp": ("ddp_config", "use_megatron_fsdp"),
}


@on_ranks(TP1, setting=list(REFUSED))
def test_refused_with_its_name(bench: Workbench, setting: str) -> None:
    """The field is set on Megatron's own config objects, so a renamed field fails here."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from sfpo_megatron.mcore.shards.refused import refuse_unsupported

    optimizer = SimpleNamespace(
        config=OptimizerConfig(optimizer="adam", lr=1e-3),
        ddp_config=DistributedDataParallelConfig(),
    )
    refuse_unsupported(optimizer)  # type: ignore[arg-type]
    owner, field = REFUSED[setting]
    assert hasattr(getattr(optimizer, owner), field), f"Megatron no longer has {owner}.{field}"
    setattr(getattr(optimizer, owner), field, True)
    try:
        refuse_unsupported(optimizer)  # type: ignore[arg-type]
    except ValueError as error:
        assert str(error).startswith(f"{setting}: found true, expected false"), error
    else:
        raise AssertionError(f"{setting} was accepted")


@on_ranks(TP1)
def test_unknown_optimizer_class_is_refused(bench: Workbench) -> None:
    from megatron.core.optimizer import OptimizerConfig

    from sfpo_megatron.mcore.shards import MainParamShards

    class Muon:
        config = OptimizerConfig(optimizer="adam", lr=1e-3)

    try:
        MainParamShards(Muon())  # type: ignore[arg-type]
    except ValueError as error:
        assert "found Muon" in str(error)
    else:
        raise AssertionError("an unknown optimizer was accepted")


@on_ranks(TP1, DP2, dtype=["float32", "bfloat16"])
def test_optimizers_without_sharding_are_repositioned(bench: Workbench, dtype: str) -> None:
    """use_distributed_optimizer=false: the same contract on FP32Optimizer and
    Float16OptimizerWithFloat16Params (a null step after the reposition changes nothing)."""
    from workbench import all_same_bits, clones

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
