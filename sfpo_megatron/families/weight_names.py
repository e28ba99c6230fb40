"""Whether the tensors of a directory are the model of its config.json, by the headers. No torch."""

from __future__ import annotations

from pathlib import Path

from sfpo_megatron.families.safetensors_header import ModelFilesError, TensorEntry
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import EMBEDDING, OUTPUT, hf_shapes, rules_of
from sfpo_megatron.families.weight_files import some

LOADABLE = ("F64", "F32", "BF16", "F16")
"""Dtypes that are weights by themselves; all others need scales."""
_SCALES = ("_scale", "_scale_inv", ".scales", ".biases", ".qweight", ".qzeros", ".absmax")
"""Ends of names that only quantized models have."""
HEAD = OUTPUT.hf[0]
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


def mtp_prefixes(num_layers: int, num_mtp_layers: int) -> tuple[str, ...]:
    """Prefixes of the tensors of multi-token prediction layers, which no model here has."""
    return tuple(f"model.layers.{num_layers + i}." for i in range(num_mtp_layers))


def not_trained(tensors: dict[str, TensorEntry], shape: ModelShape) -> list[str]:
    """Names of the tensors of multi-token prediction layers."""
    prefixes = mtp_prefixes(shape.num_layers, shape.num_mtp_layers)
    return [name for name in tensors if name.startswith(prefixes)] if prefixes else []


def check_tensors(directory: Path, tensors: dict[str, TensorEntry], shape: ModelShape) -> None:
    """ModelFilesError unless `tensors` are the model of config.json: names, sizes and dtypes."""
    expected = {
        name: size
        for rule in rules_of(shape)
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    }
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    found.difference_update(not_trained(tensors, shape))
    if shape.tied_embeddings:
        found.discard(HEAD)  # some exports repeat the embedding
    wanted = set(expected)
    for problem, names in (("missing", wanted - found), ("unknown", found - wanted)):
        if names:
            raise ModelFilesError(
                f"{problem} tensors for a {shape.family} model: {some(sorted(names))} "
                f"({len(names)} in all) in {directory}",
                "the tensors of config.json's model",
                _why(found - wanted),
            )
    for name, size in expected.items():
        entry = tensors[name]
        if entry.dtype not in LOADABLE:
            raise ModelFilesError(
                f"{name} in {entry.dtype} at {directory / entry.file}",
                f"{', '.join(LOADABLE)}",
                "use the model before quantization",
            )
        if entry.shape != size:
            raise ModelFilesError(
                f"{name} of shape {entry.shape} at {directory / entry.file}",
                f"{size} from config.json",
                "take config.json and weights of one model",
            )
    if shape.tied_embeddings:
        _check_head(directory, tensors)


def _check_head(directory: Path, tensors: dict[str, TensorEntry]) -> None:
    """Refuse a head of its own in a model that says it has none: transformers then takes it, and
    engines do not. A sample of bytes tells the two apart."""
    head, embedding = tensors.get(HEAD), tensors[EMBEDDING.hf[0]]
    if head is None or (head.dtype != embedding.dtype and head.shape == embedding.shape):
        return
    if head.shape != embedding.shape or _sample(directory, head) != _sample(directory, embedding):
        raise ModelFilesError(
            f"{HEAD} that is not {EMBEDDING.hf[0]} at {directory / head.file}",
            "the same numbers, as config.json says tie_word_embeddings: true",
            "set it to false in config.json, or remove the tensor",
        )


def _sample(directory: Path, entry: TensorEntry) -> list[bytes]:
    with (directory / entry.file).open("rb") as stream:
        step, found = max(1, entry.num_bytes // _NUM_SAMPLES), []
        for place in range(0, entry.num_bytes, step):
            stream.seek(entry.first_byte + place)
            found.append(stream.read(min(_SAMPLE_BYTES, entry.num_bytes - place)))
    return found


def _why(unknown: set[str]) -> str:
    """What to do with a directory that has these tensors too."""
    if any(name.endswith(_SCALES) for name in unknown):
        return "use the model before quantization"
    if any(".lora_" in name for name in unknown):
        return "merge the adapter into the model first"
    return "take config.json and weights of one model"
