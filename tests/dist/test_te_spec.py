"""Megatron's own TransformerEngine layer spec, over tests/te_standin: names, layout and numerics of
the CUDA path on a CPU.

Training is in test_training.py. Not exercised here: TE's kernels, FP8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from comparisons import check_logits
from harness import TE1, TE_EP2, TE_PP2, TE_SP2, TE_SP2EP2, TE_TP2, TE_VPP2, TP1, on_ranks

from sfpo_megatron.config.tree import ObjectiveConfig
from sfpo_megatron.sfpo import SlowSnapshot, sfpo_step

if TYPE_CHECKING:
    from workbench import Workbench

MODELS = ["qwen2_tied", "qwen3_untied", "llama_untied"]


@on_ranks(
    *(TE1, TE_TP2, TE_SP2, TE_PP2, TE_VPP2),
    only=[f"TE1-{model}" for model in MODELS],
    model=MODELS,
)
def test_te_spec_logits_equal_transformers(bench: Workbench, model: str) -> None:
    check_logits(bench, model, 1e-4)


@on_ranks(TE1, model=MODELS)
def test_te_spec_parameter_names_are_the_table(bench: Workbench, model: str) -> None:
    """The TE spec's own names, unmapped, are exactly the names of families.table."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    from sfpo_megatron.families.table import rule_by_name, rules_of
    from sfpo_megatron.mcore.model import named_params, unwrapped

    policy = bench.policy(model)
    assert policy.capabilities.layers == "te" and policy.capabilities.adam == "te"
    module = unwrapped(policy.chunks[0])
    first = module.decoder.layers[0].self_attention.linear_qkv
    assert isinstance(first, TELayerNormColumnParallelLinear)
    raw = [name for name, _ in module.named_parameters()]
    assert sorted(raw) == sorted(rule.megatron for rule in rules_of(policy.shape))
    assert [name for name, _ in named_params(policy.chunks)] == raw
    assert set(raw) <= set(rule_by_name(policy.shape))


@on_ranks(TE1, TE_EP2, TE_SP2EP2, grouped=[True, False], only=["TE1-True"])
def test_te_spec_of_experts(bench: Workbench, grouped: bool) -> None:
    """TEGroupedMLP (the default with TE on CUDA) and SequentialMLP: with global indices the names
    are the table's, and the logits transformers'."""
    import torch.distributed as dist

    from sfpo_megatron.families.table import rules_of
    from sfpo_megatron.mcore.model import named_params, unwrapped

    model, settings = references.TRAINED_MOE, {"transformer": {"moe_grouped_gemm": grouped}}
    policy = bench.policy(model, **settings)
    layer = unwrapped(policy.chunks[0]).decoder.layers[0]
    assert type(layer.mlp.experts).__name__ == ("TEGroupedMLP" if grouped else "SequentialMLP")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [name for name, _ in named_params(policy.chunks)])
    assert {name for names in everyone for name in names} == {
        rule.megatron for rule in rules_of(policy.shape)
    }
    check_logits(bench, model, 1e-4, **settings)


@on_ranks(TP1, TE1, needs=TP1, model=["qwen2_tied", "qwen3_untied"])
def test_te_spec_sfpo_step_equals_the_local_spec(bench: Workbench, model: str) -> None:
    """One SFPO step: losses and weights within 1e-5 of the local spec's (saved by the TP1 case)."""
    objective = ObjectiveConfig(entropy_coef=references.ENTROPY_COEF)
    policy = bench.policy(model, objective=objective)
    run_pass = bench.one_pass(policy, bench.prepared(policy))
    results = sfpo_step(
        run_pass,
        SlowSnapshot(policy.shards),
        num_fast_passes=references.K,
        alpha=references.ALPHA,
    )
    losses: list[Any] = [[m.loss for m in result.minibatches] for result in results]
    weights = bench.hf_weights(policy)
    optimizer = type(policy.optimizer.chained_optimizers[0].optimizer)
    if bench.layout == TP1:
        assert optimizer is torch.optim.AdamW
        bench.save(f"{model}.local_step", losses, weights)
        return
    assert optimizer.__module__ == "transformer_engine.pytorch.optimizers"
    expected_losses, expected = bench.load(f"{model}.local_step")
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected_losses), rtol=0, atol=1e-5
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)
