"""The same saved rollouts trained for 3 SFPO steps give the same losses and weights everywhere.

Not exercised here: the learning-rate schedule, the entropy gate, saved rollouts read by the trainer
(tests/e2e), context parallelism.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import references
from comparisons import compare, train
from harness import (
    DP2,
    EP2,
    EP2DP4,
    EP2PP2,
    PP2,
    PP2DP2,
    SP2,
    SP2EP2,
    TE1,
    TE_EP2,
    TE_PP2,
    TE_SP2,
    TE_SP2EP2,
    TE_TP2,
    TE_VPP2,
    TP1,
    TP2,
    VPP2,
    on_ranks,
)
from made.policies import OVERLAP
from safetensors.torch import load_file

if TYPE_CHECKING:
    from workbench import Workbench


@on_ranks(
    *(TP1, TP2, SP2, PP2, VPP2, DP2),
    needs=TP1,
    # Each layout with the model that it can get wrong: tied embeddings on two stages; q/k norms,
    # whose gradients are partial sums under tensor parallelism.
    full=["TP2+SP-qwen2_tied", "PP2-qwen3_untied", "PP2xVPP2-qwen3_untied", "DP2-qwen3_untied"],
    model=references.TRAINED,
)
def test_every_layout_trains_like_tp1(bench: Workbench, model: str) -> None:
    """Losses within 1e-5 and exported weights within 1e-4 of TP1's run; at TP1 the run itself is
    held to the plain PyTorch trainer (plain_sfpo.py) by the same bounds."""
    got = train(bench, model)
    if bench.layout == TP1:
        bench.save(f"{model}.tp1", *got)
        plain, weights = bench.load(references.plain_name(model))
        compare(got, (plain, weights), loss_bound=1e-5, weight_bound=1e-4)
        start = load_file(bench.directory / model / "model.safetensors")
        moved = max((weights[n] - start[n]).abs().max() for n in start)
        assert moved > 5 * 1e-4, f"weights moved by {moved:.1e} only: the bounds would not bite"
        return
    compare(got, bench.load(f"{model}.tp1"), loss_bound=1e-5, weight_bound=1e-4)


@on_ranks(TP1, TP2, SP2, TE_SP2, needs=TP1, only=[], model=["llamarope_tied"])
def test_fewer_kv_heads_than_ranks(bench: Workbench, model: str) -> None:
    """One head of keys and values over two ranks: each makes a part of it, and gathers the rest."""
    got = train(bench, model)
    if bench.layout == TP1:
        bench.save(f"{model}.tp1", *got)
        return
    compare(got, bench.load(f"{model}.tp1"), loss_bound=1e-5, weight_bound=1e-4)


@on_ranks(
    *(TE1, TE_TP2, TE_SP2, TE_PP2, TE_VPP2),
    only=["TExTP2+SP-qwen3_untied", "TExPP2-qwen2_tied"],
    model=references.TRAINED,
)
def test_te_spec_trains_like_the_plain_trainer(bench: Workbench, model: str) -> None:
    """Over tests/te_standin, whose layers exchange between tensor-parallel ranks what TE's do."""
    plain = bench.load(references.plain_name(model))
    compare(train(bench, model), plain, loss_bound=1e-5, weight_bound=1e-4)


@on_ranks(PP2DP2, needs=None, model=["qwen2_tied"])
def test_four_ranks_train_like_the_plain_trainer(bench: Workbench, model: str) -> None:
    """PP2 x DP2, with Megatron's overlapped grad reduce and param gather."""
    plain = bench.load(references.plain_name(model))
    got = train(bench, model, ddp=OVERLAP)
    compare(got, plain, loss_bound=1e-5, weight_bound=1e-4)


@on_ranks(
    *(TP1, EP2, PP2, VPP2, SP2EP2, EP2DP4, EP2PP2, TE_EP2, TE_SP2EP2), only=["TP1", "DP2xEP2"]
)
def test_experts_train_like_the_plain_trainer(bench: Workbench) -> None:
    """A mixture of experts, whose dense and expert weights have an optimizer each; no auxiliary
    loss on either side (test_aux_losses.py). On one rank, over two, and sharded over two more."""
    model = references.TRAINED_MOE
    got = train(bench, model, ddp=OVERLAP if bench.layout.data > 1 else None)
    plain = bench.load(references.plain_name(model))
    compare(got, plain, loss_bound=1e-5, weight_bound=1e-4)
