"""DeepSeek-V3 in training: the gradients of latent attention, and biases that nobody trains.

Its logits are in test_logits.py, its checkpoints in test_convert.py. Not exercised here:
TransformerEngine's kernels (its layer spec is, over tests/te_standin), groups of experts at more
than two ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import references
import torch
from comparisons import check_logits, compare, train
from harness import EP2, PP2, SP2EP2, TE1, TE_EP2, TE_SP2EP2, TP1, on_ranks
from safetensors.torch import load_file

if TYPE_CHECKING:
    from workbench import Workbench

BIAS = "e_score_correction_bias"


def biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(BIAS)}


@on_ranks(
    *(TP1, EP2, PP2, SP2EP2),
    only=[f"{layout}-deepseek_untied-3-0.8-1e-08" for layout in ("DP2xEP2", "TP2+SPxEP2")],
    model=references.LATENT_MODELS,
    k=[references.K],
    alpha=[references.ALPHA],
    eps=[references.EPS],
)
def test_trains_like_the_plain_trainer(
    bench: Workbench, model: str, k: int, alpha: float, eps: float
) -> None:
    """Three SFPO steps. Under tensor parallelism the rotated part of the key has gradients from the
    heads of all ranks. The biases come out bit for bit as they came."""
    losses, weights = train(bench, model, k=k, alpha=alpha, eps=eps)
    file = load_file(bench.directory / model / "model.safetensors")
    found = biases(weights)
    assert len(found) == 3
    for name, bias in found.items():
        assert torch.equal(bias, file[name]) and bias.any()
        del weights[name]
    plain = bench.load(references.plain_name(model, k, alpha, eps))
    compare((losses, weights), plain, loss_bound=1e-5, weight_bound=1e-4)
    still = [n for n, w in weights.items() if torch.equal(w, file[n])]
    assert not still, f"not trained: {still}"


@on_ranks(TP1, EP2, only=["DP2xEP2"])
def test_biases_stay_exact_in_bf16(bench: Workbench) -> None:
    """Float16Module would round them, a refit too: engines would choose other experts."""
    from sfpo_megatron.resharding.source import MegatronWeightSource

    model = references.LATENT_MODELS[0]
    policy = bench.policy(model, dtype="bfloat16")
    bench.one_pass(policy, bench.prepared(policy))()
    source = MegatronWeightSource(policy)
    dtypes = {meta.name: meta.dtype for meta in source.metadata()}
    sent = dict(source)
    if bench.rank:
        return
    file = load_file(bench.directory / model / "model.safetensors")
    assert sent.keys() == dtypes.keys() == file.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == dtypes[name], name
        assert (tensor.dtype == torch.float32) == name.endswith(BIAS), name
    for name, bias in biases(sent).items():
        assert torch.equal(bias, file[name])
        assert not torch.equal(bias, bias.bfloat16().float()), "too short to be rounded"


@on_ranks(
    *(TE1, TE_EP2, TE_SP2EP2),
    only=["TE1-deepseek_untied-True"],
    model=references.LATENT_MODELS,
    grouped=[True, False],
)
def test_te_spec_of_latent_attention(bench: Workbench, model: str, grouped: bool) -> None:
    """The names of Megatron's TE layer spec are the table's, and the logits transformers'."""
    import torch.distributed as dist

    from sfpo_megatron.families.table import rules_of
    from sfpo_megatron.mcore.model import named_params

    settings = {"transformer": {"moe_grouped_gemm": grouped}}
    policy = bench.policy(model, **settings)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [name for name, _ in named_params(policy.chunks)])
    assert {name for names in everyone for name in names} == {
        rule.megatron for rule in rules_of(policy.shape)
    }
    check_logits(bench, model, 1e-4, **settings)
