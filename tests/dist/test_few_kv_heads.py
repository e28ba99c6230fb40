"""Fewer heads of keys and values than tensor-parallel ranks: several ranks share one.

Megatron gives each an equal part of the head's rows of linear_qkv and gathers them in each forward.
The logits of such a model are held by test_logits.py (llamarope). Not exercised: a rank whose part
has rows of one of q, k and v alone (tests/unit/test_refit_plan.py), TransformerEngine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import exact_gradients
import references
import torch.distributed as dist
from harness import SP2, TP2, on_ranks
from made.batches import make_batch
from made.bits import same_bits
from safetensors.torch import load_file

if TYPE_CHECKING:
    from workbench import Workbench

MODEL = "qwen3_untied"
"""With norms of queries and keys, whose gradients are over all heads of all ranks."""


def made_model(bench: Workbench) -> str:
    """Name of such a model in the bench's directory, its gradient by transformers beside it."""
    name = f"one-kv-head-{bench.layout.name}/{MODEL}"
    if bench.rank == 0:
        batch = references.load_batch(bench.directory, 0)
        one_head = {"qwen3": ("Qwen3Config", {"num_key_value_heads": 1})}
        with patch.dict(references.KINDS, one_head):
            model = references.make_model(MODEL, (bench.directory / name).parent)
        mask = references.make_mask(batch)
        exact_gradients.save_next_token(model, batch, bench.directory, name, mask)
    dist.barrier()
    return name


@on_ranks(TP2, SP2, full=["TP2+SP"])
def test_gradients_are_those_of_transformers(bench: Workbench) -> None:
    """Within 1e-5 of each gradient's largest element, in float64."""
    from sfpo_megatron.mcore.passes import _forward_backward
    from sfpo_megatron.objectives.objective import NextTokenObjective
    from sfpo_megatron.sft import Teacher

    name = made_model(bench)
    policy = bench.policy(name, max_tokens=60)
    exact = exact_gradients.load_next_token(bench.directory, name)
    saved = references.load_batch(bench.directory, 0)
    batch = make_batch(**saved, response_mask=exact.response_mask)
    (minibatch,) = Teacher(bench.config_of(policy), policy).cut(batch)
    policy.shards.ready_for_training()
    objective = NextTokenObjective()
    (total,) = policy.statistics.reduce(
        objective, [_forward_backward(policy, minibatch, objective)]
    )
    assert abs(total.loss / objective.normalizer(minibatch) - exact.loss) < 1e-6 * exact.loss
    exact.assert_equal(bench.hf_gradients(policy))


@on_ranks(TP2, SP2, only=["TP2"])
def test_export_follows_training(bench: Workbench) -> None:
    from sfpo_megatron.resharding.source import MegatronWeightSource

    model = "llamarope_tied"
    policy = bench.policy(model)
    assert policy.shape.num_kv_heads == 1
    source = MegatronWeightSource(policy)
    original = load_file(bench.directory / model / "model.safetensors")
    first = {name: tensor.clone() for name, tensor in source}
    bench.one_pass(policy, bench.prepared(policy))()
    exported = {name: tensor.clone() for name, tensor in source}
    expected = bench.hf_weights(policy)
    if bench.rank != 0:
        return  # rank 0 has them
    assert first.keys() == exported.keys() == original.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(first[name], original[name]), name
        assert same_bits(exported[name], tensor), name
        assert not same_bits(exported[name], original[name]), f"{name} was not trained"
