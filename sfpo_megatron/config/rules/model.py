"""The model directory, read as JSON and file names: is it there, and does the layout fit it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules.model_files import config_json, not_a_directory, pointers, weights
from sfpo_megatron.config.rules.pipeline import pipeline_stages
from sfpo_megatron.config.rules.problem import Problem as Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.mla import MLAShape
from sfpo_megatron.families.shape import (
    ModelShape,
    UnsupportedModel,
    model_shape,
)

MIN_HEAD_DIM_ON_CPU = 32  # vLLM's CPU attention kernels start there
LATENT_DIMS_ON_CPU = (512, 64)
"""kv_lora_rank and qk_rope_head_dim: vLLM's CPU decode kernel for latents is compiled for 576."""

VOCABULARY_PADDING = 64
"""Rows of an embedding are padded to a multiple (DEFAULT_VOCAB_PADDING_SIZE of vLLM's
vocab_parallel_embedding.py), and divided over the ranks then."""


def read_model(config: RunConfig) -> Iterator[Problem | ModelShape]:
    """Problems of the directory's files and, when its config.json can be trained, the shape."""
    path = Path(config.model.path)
    if problem := not_a_directory(config.model.path):
        yield problem
        return
    shape = _read_shape(path)
    if isinstance(shape, Problem):
        yield shape
        return
    yield from pointers(path)
    if not (path / "tokenizer.json").is_file():
        yield Problem(
            "model.path",
            f"no tokenizer.json in {str(path)!r}",
            "a tokenizer beside config.json",
            "save one there with AutoTokenizer(...).save_pretrained",
            "error_when_training",
        )
    yield shape
    yield from weights(path, shape)


def model_of(config: RunConfig, *, file: str) -> ModelShape:
    """The sizes in model.path's config.json, which must be there; ConfigError without."""
    found = expected = fix = ""
    cause: Exception | None = None
    for item in read_model(config):
        if isinstance(item, ModelShape):
            return item
        found, expected, fix, cause = item.found, item.expected, item.fix, item.cause
        if item.level == "error":
            break
    else:
        expected = "a directory with config.json"
        fix = "correct the path, or download the model's config.json; weights are not needed"
    raise ConfigError(file, "model.path", found=found, expected=expected, fix=fix) from cause


def _read_shape(path: Path) -> Problem | ModelShape:
    config = config_json(path)
    if isinstance(config, Problem):
        return config
    try:
        return model_shape(config)
    except UnsupportedModel as error:
        found = f"{error.found} in {path / 'config.json'}"
        return Problem("model.path", found, error.expected, error.fix)


# ---- rules: (config, the model's shape, on CPU?) -> problems ------------------------------


def _by_tensor(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    given = (
        ("parallel.tensor", config.parallel.tensor, _not_for_megatron),
        ("rollout.tensor_parallel", config.rollout.tensor_parallel, _not_for_vllm),
    )
    for key, size, faults in given:
        for expected in faults(shape, size):
            fitting = [n for n in range(1, shape.num_heads + 1) if not any(faults(shape, n))]
            fix = f"set it to one of {', '.join(map(str, fitting))}"
            yield Problem(key, str(size), expected, fix)


def _not_for_megatron(shape: ModelShape, size: int) -> Iterator[str]:
    """What a trainer's tensor-parallel size should be and is not."""
    yield from _not_dividing(size, "num_attention_heads", shape.num_heads)
    yield from _not_dividing(size, "hidden_size", shape.hidden_size)
    yield from _not_sharing(shape, size)
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    if size % shape.num_kv_heads == 0:  # a rank's rows hold a part of a key head
        yield from _not_dividing(size, "rows of queries, keys and values", rows)


def _not_for_vllm(shape: ModelShape, size: int) -> Iterator[str]:
    """The same for an engine's, which vLLM would refuse once its workers have started."""
    yield from _not_dividing(size, "num_attention_heads", shape.num_heads)
    if shape.moe:
        yield from _not_dividing(size, "expert size", shape.moe.ffn_size)
        if shape.family == "qwen3_moe" and size > shape.moe.num_experts:
            yield f"at most the model's number of experts ({shape.moe.num_experts})"
    yield from _not_sharing(shape, size)
    padded = -(-shape.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    yield from _not_dividing(size, f"vocab_size, which vLLM pads to {VOCABULARY_PADDING}s", padded)


def _not_sharing(shape: ModelShape, size: int) -> Iterator[str]:
    """What both divide alike: MLPs, keys and values."""
    if shape.num_dense_layers:
        yield from _not_dividing(size, "intermediate_size", shape.ffn_size)
    if shape.moe and shape.moe.shared_ffn_size:
        yield from _not_dividing(size, "shared expert size", shape.moe.shared_ffn_size)
    groups = shape.num_kv_heads
    if groups % size and size % groups:  # fewer than ranks: some hold parts of a head
        yield f"a divisor or a multiple of the model's num_key_value_heads ({groups})"


def _not_dividing(size: int, name: str, number: int) -> Iterator[str]:
    if number % size:
        yield f"a divisor of the model's {name} ({number})"


def _head_dim(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    if shape.mla is not None:
        yield from _latent_dims(config, shape.mla, on_cpu)
    elif on_cpu and shape.head_dim < MIN_HEAD_DIM_ON_CPU and config.debug.train_only is None:
        yield Problem(
            "model.path",
            f"head_dim {shape.head_dim}",
            f"head_dim >= {MIN_HEAD_DIM_ON_CPU} (vLLM on CPU)",
            "use fewer, wider heads, or run on a GPU",
        )


def _latent_dims(config: RunConfig, mla: MLAShape, on_cpu: bool) -> Iterator[Problem]:
    found = (mla.kv_rank, mla.rope_dim)
    if on_cpu and found != LATENT_DIMS_ON_CPU and config.debug.train_only is None:
        yield Problem(
            "model.path",
            "kv_lora_rank {} and qk_rope_head_dim {}".format(*found),
            "{} and {} (vLLM on CPU)".format(*LATENT_DIMS_ON_CPU),
            "take a model with DeepSeek-V3's own sizes of these two, or run on a GPU",
        )


def _length(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    length = config.engine_tokens
    if length > (most := shape.max_context):
        named = f"the model's max_position_embeddings ({shape.max_position})"
        if most != shape.max_position and shape.rope_scaling is not None:
            kind, factor = shape.rope_scaling.kind, shape.rope_scaling.factor
            named = f"{most}: {named} as rope type {kind} with factor {factor:g} stretches them"
        elif most != shape.max_position:
            named = f"{most}, the least of the lengths in the model's config.json"
        yield Problem(
            "rollout.max_response_tokens",
            f"{length} tokens with the prompt",
            f"at most {named}",
            "lower max_prompt_tokens or max_response_tokens",
        )


MODEL_RULES: tuple[Callable[[RunConfig, ModelShape, bool], Iterator[Problem]], ...] = (
    _by_tensor,
    pipeline_stages,
    _head_dim,
    _length,
)
