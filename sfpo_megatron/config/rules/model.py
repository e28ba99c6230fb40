"""The model directory, read as JSON and file names: is it there, and does the layout fit it?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.paths import looks_like_path
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.mla import MLAShape
from sfpo_megatron.families.shape import (
    ModelShape,
    UnsupportedModel,
    model_shape,
    read_hf_config,
)

MIN_HEAD_DIM_ON_CPU = 32  # vLLM's CPU attention kernels start there
LATENT_DIMS_ON_CPU = (512, 64)
"""kv_lora_rank and qk_rope_head_dim: vLLM's CPU decode kernel for latents is compiled for 576."""

_UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of a rule."""

    key: str
    found: str
    expected: str
    fix: str
    level: Literal["error", "error_when_training", "error_when_writing", "warning"] = "error"

    @property
    def message(self) -> str:
        """What follows the key."""
        return f"found {self.found}, expected {self.expected}; {self.fix}"


def read_model(config: RunConfig) -> Iterator[Problem | ModelShape]:
    """Problems of the directory's files and, when its config.json can be trained, the shape."""
    path = Path(config.model.path)
    if not path.exists():
        if looks_like_path(config.model.path):
            yield Problem(
                "model.path",
                f"no directory {config.model.path!r} in {Path.cwd()}",
                "a Hugging Face model directory",
                "correct the path or make the model first (tools/make_tiny_model.py)",
            )
        else:
            yield Problem(
                "model.path",
                f"the hub id {config.model.path!r}",
                "a model directory on this machine",
                "download it and give the directory; its sizes are not checked until then",
                "error_when_training",
            )
        return
    shape = _read_shape(path)
    if isinstance(shape, Problem):
        yield shape
        return
    if not (path / "tokenizer.json").is_file():
        yield Problem(
            "model.path",
            f"no tokenizer.json in {str(path)!r}",
            "a tokenizer beside config.json",
            "save one there with AutoTokenizer(...).save_pretrained",
            "error_when_training",
        )
    yield from _weights(path)
    yield shape


def model_of(config: RunConfig, *, file: str) -> ModelShape:
    """The sizes in model.path's config.json, which must be there; ConfigError without."""
    for item in read_model(config):
        if isinstance(item, ModelShape):
            return item
        if item.level == "error":
            raise ConfigError(
                file, item.key, found=item.found, expected=item.expected, fix=item.fix
            )
    raise ConfigError(
        file,
        "model.path",
        found=f"the hub id {config.model.path!r}",
        expected="a directory with config.json",
        fix="download the model's config.json; weights are not needed",
    )


def _read_shape(path: Path) -> Problem | ModelShape:
    file = path / "config.json"
    if not file.is_file():
        what = "no config.json in" if path.is_dir() else "a file, not a directory, at"
        return Problem(
            "model.path",
            f"{what} {str(path)!r}",
            "a Hugging Face model directory",
            "point model.path at the folder that holds config.json",
        )
    try:
        return model_shape(read_hf_config(path))
    except UnsupportedModel as error:
        return Problem("model.path", f"{error.found} in {file}", error.expected, error.fix)
    except ValueError as error:
        return Problem(
            "model.path", f"{file}: {error}", "valid JSON", "restore the model's config.json"
        )


def _weights(path: Path) -> Iterator[Problem]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            yield Problem(
                "model.path", f"{index}: {error!r}", "a weight_map", "download the index again"
            )
            return
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            yield Problem(
                "model.path",
                f"{len(missing)} of {len(names)} weight files missing ({missing[0]}...)",
                f"every file that {index.name} lists",
                "finish the download",
                "error_when_training",
            )
    elif not any(path.glob("*.safetensors")):
        yield Problem(
            "model.path",
            f"no *.safetensors in {str(path)!r}",
            "the model's weights",
            "download or convert them; only safetensors is read",
            "error_when_training",
        )


# ---- rules: (config, the model's shape, on CPU?) -> problems ------------------------------


def _by_tensor(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    heads = shape.num_heads
    sizes = {
        "num_attention_heads": heads,
        "hidden_size": shape.hidden_size,
    }
    if shape.num_dense_layers:
        sizes["intermediate_size"] = shape.ffn_size
    if shape.moe and shape.moe.shared_ffn_size:
        sizes["shared expert size"] = shape.moe.shared_ffn_size
    tensor = config.parallel.tensor
    for name, size in sizes.items():
        if size % tensor:
            yield Problem(
                "parallel.tensor",
                str(tensor),
                f"a divisor of the model's {name} ({size})",
                f"set it to one of {_divisors(heads, heads)}",
            )
    groups = shape.num_kv_heads
    if groups % tensor and tensor % groups:  # fewer than ranks: some hold parts of a head
        yield Problem(
            "parallel.tensor",
            str(tensor),
            f"a divisor or a multiple of the model's num_key_value_heads ({groups})",
            f"set it to one of {_divisors(heads, groups)}",
        )
    engine = config.rollout.tensor_parallel
    if heads % engine:
        yield Problem(
            "rollout.tensor_parallel",
            str(engine),
            f"a divisor of the model's num_attention_heads ({heads})",
            f"set it to one of {_divisors(heads, heads)}",
        )


def _by_pipeline(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    parallel, layers = config.parallel, shape.num_layers
    if any(name in config.megatron.transformer for name in _UNEVEN_STAGES):
        return  # Megatron checks what the user divided by hand
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if layers % chunks:
        yield Problem(
            "parallel.pipeline",
            f"{parallel.pipeline} stages x {parallel.virtual_pipeline or 1} chunks",
            f"a divisor of the model's num_hidden_layers ({layers})",
            f"make pipeline x virtual_pipeline one of {_divisors(layers, layers)}",
        )


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
    if length > shape.max_position:
        yield Problem(
            "rollout.max_response_tokens",
            f"{length} tokens with the prompt",
            f"at most the model's max_position_embeddings ({shape.max_position})",
            "lower max_prompt_tokens or max_response_tokens",
        )


def _divisors(a: int, b: int) -> str:
    return ", ".join(str(n) for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0)


MODEL_RULES: tuple[Callable[[RunConfig, ModelShape, bool], Iterator[Problem]], ...] = (
    _by_tensor,
    _by_pipeline,
    _head_dim,
    _length,
)
