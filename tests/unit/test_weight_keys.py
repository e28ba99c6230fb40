"""Which tensors of a checkpoint are a model's, and what is no checkpoint of that model.

That Megatron itself passes over what is found here: tests/dist/test_checkpoint.py.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from made.models import OF_EXPERTS, TINY

from sfpo_megatron.checkpoints.store import CheckpointError
from sfpo_megatron.checkpoints.weight_keys import Sizes, stacked, weight_places
from sfpo_megatron.families.shape import ModelShape, model_shape
from sfpo_megatron.families.table import hf_shapes, rules_of

EMBEDDING = "embedding.word_embeddings.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


def shape_of(**changes: object) -> ModelShape:
    return model_shape({**TINY, **changes})


def sizes_of(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of the model, layers and experts stacked."""
    sizes = {}
    for rule in rules_of(shape):
        place, parts = stacked(rule.megatron), hf_shapes(rule, shape)
        counts = {"layer": shape.num_layers, "expert": shape.moe.num_experts if shape.moe else 0}
        leading = [counts[axis] for axis in place.axes]
        sizes[place.key] = (*leading, sum(part[0] for part in parts), *parts[0][1:])
    return sizes


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", *OF_EXPERTS])
def test_a_checkpoint_of_the_model(architecture: str) -> None:
    """Its optimizer and its padded vocabulary are in nobody's way."""
    of_experts = OF_EXPERTS.get(architecture, {})
    shape = shape_of(architectures=[architecture], tie_word_embeddings=False, **of_experts)
    sizes = sizes_of(shape)
    rows, *rest = sizes[EMBEDDING]
    sizes |= {EMBEDDING: (rows + 27, *rest), "optimizer.state.exp_avg.x": (1,)}
    places = weight_places(Path("c"), shape, sizes)
    assert [rule for rule, _ in places] == rules_of(shape)
    assert all(place.key in sizes for _, of_rule in places for place in of_rule)


def other_sizes(key: str, size: tuple[int, ...]) -> Sizes:
    return sizes_of(shape_of()) | {key: size}


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (other_sizes(EMBEDDING, (100, 48)), rf"{EMBEDDING}: found shape \(100, 48\), expected"),
        (other_sizes(FC1, (3, 48)), rf"{FC1}: found shape \(3, 48\), expected"),
        (other_sizes(FC1, (3,)), rf"{FC1}: found shape \(3,\), expected"),
        (other_sizes("output_layer.weight", (101, 48)), "no rule for key output_layer.weight"),
        (sizes_of(shape_of(architectures=["Qwen3ForCausalLM"])), "no key for .*linear_qkv.bias"),
        (sizes_of(shape_of(num_hidden_layers=2)), r"layers.* found shape \(2, "),
    ],
)
def test_a_checkpoint_of_another_model(sizes: Sizes, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        weight_places(Path("c"), shape_of(architectures=["Qwen2ForCausalLM"]), sizes)


def test_multi_token_prediction_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """With a warning, as it is where a Hugging Face directory has it."""
    shape = shape_of()
    sizes = sizes_of(shape) | {"mtp.layers.0.eh_proj.weight": (48, 96)}
    with caplog.at_level(logging.WARNING):
        places = weight_places(Path("c"), shape, sizes)
    assert len(places) == len(rules_of(shape))
    assert "1 tensors of multi-token prediction layers are left out" in caplog.text
