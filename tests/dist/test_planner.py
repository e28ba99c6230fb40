"""The planner's memory against real allocations, rank by rank.

Params, grads, main params, optimizer state and snapshot: the bytes. Activations: the most that
autograd held at a time while a pass ran, within 10%; 15% where ranks share experts, which get what
the routers send. Not exercised here: TransformerEngine itself (tests/te_standin keeps for the
backward pass what its modules keep), a GPU's allocator.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import (
    DP2,
    EP2,
    EP2DP4,
    EP2PP2,
    PP2,
    SP2,
    SP2EP2,
    TE1,
    TE_EP2,
    TE_PP2,
    TE_VPP2,
    TEDP2,
    TP1,
    TP2,
    TP2PP2,
    TP2PP2DP2,
    VPP2,
    Layout,
    on_ranks,
)
from made.policies import OVERLAP, adam_states
from references import LATENT_MODELS
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy
    from sfpo_megatron.planner.params import Spec

EXAMPLES = Path(__file__).parents[2] / "examples"


@on_ranks(
    *(TP1, TP2, SP2, PP2, VPP2, DP2, TP2PP2, TP2PP2DP2),
    only=["TP1-qwen3_untied", "TP2+SP-qwen2_tied", "PP2xVPP2-qwen2_tied", "DP2-qwen2_tied"],
    model=["qwen2_tied", "qwen3_untied"],
)
def test_memory(bench: Workbench, model: str) -> None:
    check_memory(bench, model)


@on_ranks(TP1, EP2, SP2EP2, EP2DP4, EP2PP2, only=["DP2xEP2-qwen3moe_untied"], model=[
    "qwen3moe_untied", "mixtral_tied",
])  # fmt: skip
def test_memory_of_experts(bench: Workbench, model: str) -> None:
    check_memory(bench, model)


# As with TE on CUDA; in Python where torch.compile is off.
FUSIONS = {"bias_activation_fusion": True}


@on_ranks(TE1, TE_PP2, TE_VPP2, TEDP2, only=["TE1-qwen3_untied"], model=[
    "qwen2_tied", "qwen3_untied",
])  # fmt: skip
def test_memory_of_the_te_spec(bench: Workbench, model: str) -> None:
    """Over tests/te_standin, whose modules keep for the backward pass what TE's keep."""
    check_memory(bench, model, spec="te", transformer=FUSIONS)


@on_ranks(TE1, TE_EP2, only=["TExDP2xEP2-qwen3moe_untied"], model=["qwen3moe_untied"])
def test_memory_of_experts_in_the_te_spec(bench: Workbench, model: str) -> None:
    check_memory(bench, model, spec="te", transformer=FUSIONS | {"moe_grouped_gemm": True})


@on_ranks(TP1, EP2, SP2EP2, EP2PP2, only=["DP2xEP2-deepseek_untied"], model=LATENT_MODELS)
def test_memory_of_latent_attention(bench: Workbench, model: str) -> None:
    check_memory(bench, model)


def check_memory(bench: Workbench, model: str, spec: Spec = "local", **settings: Any) -> None:
    from sfpo_megatron.planner.memory import rank_memory
    from sfpo_megatron.sfpo import SlowSnapshot

    for dtype in ("bfloat16", "float32"):
        ddp = OVERLAP if bench.layout.data > 1 else None
        policy = bench.policy(
            model, dtype=dtype, max_tokens=100, minibatches=1, ddp=ddp, **settings
        )
        minibatches = bench.prepared(policy)
        saved = SavedTensors(policy)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            bench.one_pass(policy, minibatches)()
        buffers = [
            b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        moments = ("exp_avg", "exp_avg_sq")
        shards = list(policy.shards.tensors())
        measured = {
            "params": sum(buffer.param_data.nbytes for buffer in buffers),
            "grads": sum(buffer.grad_data.nbytes for buffer in buffers),
            "main_params": sum(t.nbytes for t in shards) if dtype == "bfloat16" else 0,
            "optimizer": sum(s[name].nbytes for s in adam_states(policy) for name in moments),
            "snapshot": SlowSnapshot(policy.shards).num_bytes,
        }
        tokens, padding = size_of(minibatches, bench.layout, policy.layout.pipeline_rank)
        planned = rank_memory(
            policy.shape,
            bench.config_of(policy),
            stage=policy.layout.pipeline_rank,
            data_rank=policy.layout.data_rank,
            spec=spec,
            tokens=tokens,
            padding=padding,
            microbatches=len(minibatches[0].microbatches),
        )
        expected = {name: getattr(planned, name) for name in measured}
        assert measured == expected, f"{dtype}: measured {measured}, planned {expected}"
        logits = 0 if planned.logits == 0 else tokens * logit_width(policy) * saved.dtype_bytes
        ratio = (planned.activations + logits) / saved.peak
        bench.figures[f"activations_{dtype}"] = ratio
        off = 0.15 if bench.layout.expert > 1 else 0.1  # routers send one rank more than another
        assert abs(ratio - 1) <= off, f"{dtype}: planned {planned.activations} + {logits}, {saved}"


def logit_width(policy: Policy) -> int:
    return policy.shape.padded_vocab_size(policy.layout.tensor_size) // policy.layout.tensor_size


def size_of(minibatches: Any, layout: Layout, stage: int) -> tuple[int, float]:
    """(tokens of a microbatch, padded / packed): the mean of those in flight at a time, where they
    are most."""
    (minibatch,) = minibatches
    sizes = [m.token_ids.numel() for m in minibatch.microbatches]
    window = 1 if layout.virtual else min(layout.pipeline - stage, len(sizes))
    assert layout.virtual is None or len(sizes) >= 2
    start = max(range(len(sizes) - window + 1), key=lambda i: sum(sizes[i : i + window]))
    held = minibatch.microbatches[start : start + window]
    padded = sum(
        (m.cu_seqlens.numel() - 1) * int(m.cu_seqlens.diff().max()) / m.token_ids.numel()
        for m in held
    )
    return round(sum(sizes[start : start + window]) / window), padded / window


class SavedTensors:
    """Bytes of distinct storages that autograd holds, params not counted: now, and the most."""

    def __init__(self, policy: Policy) -> None:
        buffers = [
            b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        self._params = {b.param_data.untyped_storage().data_ptr() for b in buffers}
        self._held: Counter[int] = Counter()
        self._now = self.peak = 0
        self.dtype_bytes = buffers[0].param_data.element_size()

    def __repr__(self) -> str:
        return f"held {self.peak} at most"

    def pack(self, tensor: Tensor) -> Held:
        return Held(self, tensor)

    def add(self, tensor: Tensor, sign: int) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._params:
            return
        before = self._held[key]
        self._held[key] += sign
        if (before == 0) != (self._held[key] == 0):
            self._now += sign * storage.nbytes()
            self.peak = max(self.peak, self._now)


class Held:
    """Keeps the tensor, and its storage counted, for as long as autograd keeps this."""

    def __init__(self, saved: SavedTensors, tensor: Tensor) -> None:
        self._saved, self.tensor = saved, tensor
        saved.add(tensor, 1)

    def __del__(self) -> None:
        self._saved.add(self.tensor, -1)


@on_ranks(TP1)
def test_settings_of_the_examples_exist(bench: Workbench) -> None:
    """Every name under `megatron:` in examples/ is a field of the installed megatron-core's."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from sfpo_megatron.config.load import load_config

    files = list(EXAMPLES.glob("*/*.yaml"))
    assert len(files) > 10
    for file in files:
        settings = load_config(file).megatron
        for given, cls in (
            (settings.transformer, TransformerConfig),
            (settings.ddp, DistributedDataParallelConfig),
            (settings.optimizer, OptimizerConfig),
        ):
            assert set(given) <= {field.name for field in dataclasses.fields(cls)}, file


def test_experts_ranks_are_neighbours() -> None:
    """What planner/time.py counts on: eight ranks that share experts are of one node, however many
    tensor-parallel ranks there are."""
    from megatron.core.parallel_state import RankGenerator

    dealt = RankGenerator(tp=1, ep=8, dp=4, pp=1, cp=1, order="tp-cp-ep-dp-pp")
    assert dealt.get_ranks("ep")[:2] == [list(range(8)), list(range(8, 16))]
