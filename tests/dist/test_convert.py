"""Converted checkpoints and Megatron's own: each side reads what the other has written.

A model converted in one plain process is loaded by Megatron's dist_checkpointing at TP2 x PP2 or
EP2 x PP2 and gives transformers' logits; after a pass the trainer's own code saves it, with
the optimizer, and converted back: the same bits. Not exercised here: Megatron-LM's command line,
TransformerEngine's extra state, nor its grouped experts, which need it; what is converted and
converted back at once (tests/unit).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from comparisons import check_logits_of
from harness import EP2PP2, SP2EP2PP2, TE1, TE_SP2, TP2PP2, on_ranks
from made.bits import all_same_bits
from references import LATENT_MODELS, MODELS, MOE_MODELS, MORE_MODELS
from safetensors.torch import load_file

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy

QUICK = ("mistral_untied", "qwen2win_tied", "llamarope_tied")


@on_ranks(
    TP2PP2,
    only=[f"TP2xPP2-{model}" for model in QUICK],
    model=MODELS + MORE_MODELS,
)
def test_round_trip_through_megatron(bench: Workbench, model: str) -> None:
    check_round_trip(bench, model)


@on_ranks(EP2PP2, only=["DP2xEP2xPP2-qwen3moe_untied"], model=MOE_MODELS)
def test_experts_round_trip_through_megatron(bench: Workbench, model: str) -> None:
    check_round_trip(bench, model)


@on_ranks(SP2EP2PP2, only=["TP2+SPxEP2xPP2-deepseek_untied"], model=LATENT_MODELS)
def test_latent_attention_round_trip_through_megatron(bench: Workbench, model: str) -> None:
    """Layers that differ: their keys are numbered."""
    check_round_trip(bench, model)


@on_ranks(TE1, TE_SP2, only=["TE1-qwen2_tied"], model=["qwen2_tied", "qwen3_untied"])
def test_round_trip_of_the_te_spec(bench: Workbench, model: str) -> None:
    check_round_trip(bench, model)
    bench.figures.clear()  # a result has one layout a family: those above


def check_round_trip(bench: Workbench, model: str) -> None:
    from sfpo_megatron.convert.to_hf import megatron_to_hf
    from sfpo_megatron.convert.to_megatron import hf_to_megatron
    from sfpo_megatron.mcore.checkpoint import begin_save

    hf, folder = bench.directory / model, bench.directory / f"convert-{bench.layout.name}-{model}"
    policy = bench.policy(model)
    if bench.rank == 0:
        folder.mkdir()
        hf_to_megatron(hf, folder / "megatron", policy.parallel)
        (folder / "saved").mkdir()
    dist.barrier()
    load(policy, folder / "megatron/release")
    check_logits_of(bench, policy, model, 1e-4)
    worst = torch.tensor(bench.figures.get("max_difference", 0.0))  # known to the last stage
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    bench.figures["max_difference"] = float(worst)
    policy.optimizer.reload_model_params()
    bench.one_pass(policy, bench.prepared(policy))()
    begin_save(policy, folder / "saved", step=1, form="native").finish()
    expected = bench.hf_weights(policy)
    if bench.rank == 0:
        megatron_to_hf(folder / "saved", folder / "hf", hf=hf)
        back = load_file(folder / "hf/model.safetensors")
        assert back.keys() == expected.keys()
        assert all_same_bits(back.values(), (expected[name] for name in back))
        assert json.loads((folder / "hf/config.json").read_text())["dtype"] == "float32"


def sharded(policy: Policy) -> dict[str, object]:
    from sfpo_megatron.mcore.model import unwrapped

    return {f"model{i}": unwrapped(c).sharded_state_dict() for i, c in enumerate(policy.chunks)}


def load(policy: Policy, directory: Path) -> None:
    """Megatron reads them, into params that are not a number before."""
    from megatron.core import dist_checkpointing

    from sfpo_megatron.mcore.model import named_params, unwrapped

    with torch.no_grad():
        for _, param in named_params(policy.chunks):
            param.fill_(float("nan"))
    loaded = dist_checkpointing.load(sharded(policy), str(directory))
    assert loaded["args"].num_layers == policy.shape.num_layers
    for index, chunk in enumerate(policy.chunks):
        unwrapped(chunk).load_state_dict(loaded[f"model{index}"])
