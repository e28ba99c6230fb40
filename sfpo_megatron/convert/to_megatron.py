"""A Hugging Face directory -> a torch_dist checkpoint that Megatron-LM and the trainer load.

OUT/latest_checkpointed_iteration.txt    "release": weights without an optimizer
OUT/release/                             torch_dist
OUT/hf/                                  config.json, tokenizer, chat template...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from sfpo_megatron.checkpoints.store import MEGATRON_TRACKER
from sfpo_megatron.checkpoints.weight_keys import numbered, stacked
from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.convert.locate import HF_FILES
from sfpo_megatron.convert.progress import Progress
from sfpo_megatron.convert.torch_dist import TorchDistWriter
from sfpo_megatron.families.hf_files import HFCheckpoint, copy_companions
from sfpo_megatron.families.megatron_args import megatron_lm_args
from sfpo_megatron.families.operations import merge
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.shape import ModelShape, model_shape, read_hf_config
from sfpo_megatron.families.table import EMBEDDING, rules_of
from sfpo_megatron.outputs.aside import writing

RELEASE = "release"
TOOL = "convert_hf_to_megatron"


def hf_to_megatron(
    hf: Path, out: Path, parallel: ParallelConfig, *, overwrite: bool = False
) -> None:
    """Write `out`, whole or not at all. ValueError names what does not fit; UnsupportedModel
    a model of no family here. `overwrite`: as in `writing`."""
    shape = model_shape(read_hf_config(hf))
    _check_layout(shape, parallel)
    with writing(out, tool=TOOL, inputs=(hf,), overwrite=overwrite) as aside:
        _convert(HFCheckpoint(hf, shape), hf, aside, shape, parallel)


def _convert(
    source: HFCheckpoint, hf: Path, aside: Path, shape: ModelShape, parallel: ParallelConfig
) -> None:
    (aside / RELEASE).mkdir()
    writer = TorchDistWriter(aside / RELEASE)
    rules = rules_of(shape)
    progress = Progress(len(rules))
    dtype = source.dtypes()[EMBEDDING.hf[0]]
    for rule in rules:
        whole = _padded(rule, merge(rule, source.parts(rule), shape), shape, parallel.tensor)
        _write(writer, rule, whole, shape, parallel)
        progress.step(rule.megatron, whole.nbytes)
    for key in _extra_state_keys(shape):
        writer.object(key, None)
    arguments = megatron_lm_args(shape, parallel, dtype=str(dtype).removeprefix("torch."))
    writer.close({"args": arguments, "checkpoint_version": 3.0, "iteration": 0})
    (aside / HF_FILES).mkdir()
    copy_companions(hf, aside / HF_FILES, dtype=None)
    (aside / MEGATRON_TRACKER).write_text(RELEASE, encoding="utf-8")


def _check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    experts = shape.moe.num_experts if shape.moe else 1
    for flag, size, what, total in (
        ("--tp", parallel.tensor, "attention heads", shape.num_heads),
        ("--tp", parallel.tensor, "MLP size", shape.ffn_size),
        ("--tp", parallel.tensor, "shared expert", shape.moe.shared_ffn_size if shape.moe else 0),
        ("--pp", parallel.pipeline, "layers", shape.num_layers),
        ("--ep", parallel.expert, "experts", experts),
    ):
        if total % size:
            raise ValueError(
                f"{flag}: found {size}, expected a divisor of the model's {what} ({total}); choose "
                "another (the checkpoint loads into every layout anyway)"
            )


def _padded(rule: Rule, whole: Tensor, shape: ModelShape, tensor: int) -> Tensor:
    """Add the zero rows that make the vocabulary divisible by `tensor`."""
    if rule.kind != "vocab" or (missing := shape.padded_vocab_size(tensor) - whole.shape[0]) == 0:
        return whole
    padded = whole.new_zeros(whole.shape[0] + missing, *whole.shape[1:])
    padded[:-missing] = whole
    return padded


def _write(
    writer: TorchDistWriter, rule: Rule, whole: Tensor, shape: ModelShape, parallel: ParallelConfig
) -> None:
    """Cut over tensor-parallel ranks as Megatron cuts it when it saves: gate and up apart."""
    place = (numbered if shape.layers_differ else stacked)(rule.megatron)
    sizes = {"layer": shape.num_layers, "expert": shape.moe.num_experts if shape.moe else 0}
    counts = [sizes[axis] for axis in place.axes]
    size = parallel.expert_tensor if rule.expert else parallel.tensor
    pieces = 1 if rule.tp_dim is None else size
    dimension = rule.tp_dim or 0
    at = 0
    for chunk in whole.chunk(2 * pieces if rule.kind == "gate_up" else pieces, dim=dimension):
        start = [0] * whole.dim()
        start[dimension] = at
        writer.tensor(
            place.key,
            chunk[(None,) * len(place.index)],
            offsets=(*place.index, *start),
            shape=(*counts, *whole.shape),
        )
        at += chunk.shape[dimension]


def _extra_state_keys(shape: ModelShape) -> Iterator[str]:
    """Empty extra state of every module that asks for it: Megatron-LM's loader is strict. A
    ShardedObject's key is `name/shard_PLACE_COUNTS`."""
    moe = shape.moe
    for layer in range(shape.num_layers):
        prefix, place, count = "decoder.layers.", str(layer), str(shape.num_layers)
        if shape.layers_differ:
            prefix, place, count = f"decoder.layers.{layer}.", "0", "1"
        for module in _with_extra_state(shape, layer):
            yield f"{prefix}{module}._extra_state/shard_{place}_{count}"
        of_experts = range(moe.num_experts if moe and layer >= moe.num_dense_layers else 0)
        for linear, expert in itertools.product((1, 2), of_experts):
            where = f"shard_{place}.{expert}_{count}.{len(of_experts)}"
            if shape.layers_differ:
                where = f"shard_{expert}_{len(of_experts)}"
            yield f"{prefix}mlp.experts.experts.linear_fc{linear}._extra_state/{where}"


def _with_extra_state(shape: ModelShape, layer: int) -> Iterator[str]:
    linears: Iterable[str] = ("linear_qkv", "linear_proj")
    if shape.mla is not None:
        linears = shape.mla.matrices(shape.hidden_size, shape.num_heads)
    yield from (f"self_attention.{name}" for name in (*linears, "core_attention"))
    if layer < shape.num_dense_layers:
        yield from ("mlp.linear_fc1", "mlp.linear_fc2")
    elif shape.moe and shape.moe.shared_ffn_size:
        yield from ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
