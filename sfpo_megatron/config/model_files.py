"""The model directory, read as JSON and file names: is it there, and does the layout fit it?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import MOE_FAMILIES, SUPPORTED_ARCHITECTURES

MIN_HEAD_DIM_ON_CPU = 32  # vLLM's CPU attention kernels start there

ModelJson = dict[str, Any]
_UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of a rule."""

    key: str
    found: str
    expected: str
    fix: str
    level: Literal["error", "error_when_training", "warning"] = "error"


def looks_like_path(value: str) -> bool:
    """A hub id is `owner/name` (or `name`) and nothing of it exists here; the rest are paths."""
    if value.startswith(("/", "./", "../", "~")) or value in (".", "..") or value.endswith("/"):
        return True
    first, _, rest = value.partition("/")
    return "/" in rest or Path(first).exists()


def read_model_json(config: RunConfig) -> Iterator[Problem | ModelJson]:
    """Problems of the directory's files and, when it can be read, the model's config.json."""
    path = Path(config.model.path).expanduser()
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
    model = None
    for item in _read_json(path):
        if isinstance(item, Problem):
            yield item
        else:
            model = item
    if model is None:
        return
    if not (path / "tokenizer.json").is_file():
        yield Problem(
            "model.path",
            f"no tokenizer.json in {str(path)!r}",
            "a tokenizer beside config.json",
            "save one there with AutoTokenizer(...).save_pretrained",
        )
    yield from _weights(path)
    yield model


def _read_json(path: Path) -> Iterator[Problem | ModelJson]:
    file = path / "config.json"
    if not file.is_file():
        what = "no config.json in" if path.is_dir() else "a file, not a directory, at"
        yield Problem(
            "model.path",
            f"{what} {str(path)!r}",
            "a Hugging Face model directory",
            "point model.path at the folder that holds config.json",
        )
        return
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        yield Problem(
            "model.path", f"{file}: {error}", "valid JSON", "restore the model's config.json"
        )
        return
    architectures = model.get("architectures") if isinstance(model, dict) else None
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in SUPPORTED_ARCHITECTURES:
        yield Problem(
            "model.path",
            f"architecture {name} in {file}",
            f"one of {', '.join(SUPPORTED_ARCHITECTURES)}",
            "choose a model of these families",
        )
        return
    for size in _SIZES:
        value = model.get(size)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield Problem(
                "model.path",
                f"{size} = {value!r} in {file}",
                "a positive integer",
                "restore the model's config.json",
            )
            return
    yield model


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


# ---- rules: (config, the model's config.json, on CPU?) -> problems ------------------------------


def _unsupported(config: RunConfig, model: ModelJson, on_cpu: bool) -> Iterator[Problem]:
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = model.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    sliding = model.get("use_sliding_window") or "sliding_attention" in (
        model.get("layer_types") or ()
    )
    refused = {
        "quantization_config": (
            model.get("quantization_config") is not None,
            "unquantized weights",
            "use the model before quantization",
        ),
        f"rope type {kind}": (
            kind not in ("default", "llama3"),
            "rope type default or llama3",
            "use a model without it",
        ),
        f"partial_rotary_factor {partial}": (
            partial != 1.0,
            "rotary embeddings on the whole head",
            "choose another model",
        ),
        "sliding-window attention": (
            bool(sliding),
            "full attention",
            "set use_sliding_window to false in config.json if the context fits the window",
        ),
        f"hidden_act {model.get('hidden_act')}": (
            model.get("hidden_act", "silu") != "silu",
            "silu",
            "choose a model with a SwiGLU MLP",
        ),
        "attention_bias": (
            bool(model.get("attention_bias")),
            "no attention bias beyond the family's own",
            "choose another model",
        ),
        "mlp_bias": (bool(model.get("mlp_bias")), "no MLP bias", "choose another model"),
    }
    for found, (is_there, expected, fix) in refused.items():
        if is_there:
            yield Problem("model.path", f"{found} in its config.json", expected, fix)


def _by_tensor(config: RunConfig, model: ModelJson, on_cpu: bool) -> Iterator[Problem]:
    heads = model["num_attention_heads"]
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("num_key_value_heads") or heads,
        "hidden_size": model["hidden_size"],
    }
    if SUPPORTED_ARCHITECTURES[model["architectures"][0]] not in MOE_FAMILIES:
        sizes["intermediate_size"] = model["intermediate_size"]
    tensor = config.parallel.tensor
    for name, size in sizes.items():
        if size % tensor:
            yield Problem(
                "parallel.tensor",
                str(tensor),
                f"a divisor of the model's {name} ({size})",
                f"set it to one of {_divisors(heads, sizes['num_key_value_heads'])}",
            )
    engine = config.rollout.tensor_parallel
    if heads % engine:
        yield Problem(
            "rollout.tensor_parallel",
            str(engine),
            f"a divisor of the model's num_attention_heads ({heads})",
            f"set it to one of {_divisors(heads, heads)}",
        )


def _by_pipeline(config: RunConfig, model: ModelJson, on_cpu: bool) -> Iterator[Problem]:
    parallel, layers = config.parallel, model["num_hidden_layers"]
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


def _head_dim(config: RunConfig, model: ModelJson, on_cpu: bool) -> Iterator[Problem]:
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    if model.get("head_dim") is None and hidden % heads:
        yield Problem(
            "model.path",
            f"hidden_size {hidden} with {heads} heads in its config.json",
            "a whole head_dim",
            "restore the model's config.json",
        )
        return
    head_dim = model.get("head_dim") or hidden // heads
    if on_cpu and head_dim < MIN_HEAD_DIM_ON_CPU and config.debug.train_only is None:
        yield Problem(
            "model.path",
            f"head_dim {head_dim}",
            f"head_dim >= {MIN_HEAD_DIM_ON_CPU} (vLLM on CPU)",
            "use fewer, wider heads, or run on a GPU",
        )


def _length(config: RunConfig, model: ModelJson, on_cpu: bool) -> Iterator[Problem]:
    limit = model.get("max_position_embeddings")
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if limit is not None and length > limit:
        yield Problem(
            "rollout.max_response_tokens",
            f"{length} tokens with the prompt",
            f"at most the model's max_position_embeddings ({limit})",
            "lower max_prompt_tokens or max_response_tokens",
        )


def _divisors(a: int, b: int) -> str:
    return ", ".join(str(n) for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0)


MODEL_RULES: tuple[Callable[[RunConfig, ModelJson, bool], Iterator[Problem]], ...] = (
    _unsupported,
    _by_tensor,
    _by_pipeline,
    _head_dim,
    _length,
)
