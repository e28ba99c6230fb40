"""Hugging Face safetensors straight into tensor-, pipeline- and expert-parallel shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from sfpo_megatron.families.rules import cut, hf_shapes, merge
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import rule_by_name, rules_of
from sfpo_megatron.mcore.model import named_params


class HFCheckpoint:
    """The tensors of a Hugging Face directory by name, read lazily; checked against the model."""

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        self._directory = Path(directory)
        index = self._directory / "model.safetensors.index.json"
        if index.exists():
            self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        else:
            self._file_of = {}
            for file in sorted(self._directory.glob("*.safetensors")):
                with safe_open(file, framework="pt") as handle:
                    self._file_of.update(dict.fromkeys(handle.keys(), file.name))
        if not self._file_of:
            raise FileNotFoundError(f"{self._directory}: found no *.safetensors, expected weights")
        expected = {name for rule in rules_of(shape) for name in rule.hf}
        found = {n for n in self._file_of if not n.endswith("rotary_emb.inv_freq")}
        if shape.tied_embeddings:
            found.discard("lm_head.weight")  # some exports repeat the embedding
        for problem, names in (("missing", expected - found), ("unknown", found - expected)):
            if names:
                raise ValueError(
                    f"{self._directory}: {problem} tensors for a {shape.family} model: "
                    f"{', '.join(sorted(names)[:5])} ({len(names)} in all)"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._directory / self._file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)


@torch.no_grad()
def load_hf_weights(
    chunks: list[torch.nn.Module],
    shape: ModelShape,
    directory: str | Path,
    *,
    tensor: tuple[int, int],
    expert_tensor: tuple[int, int],
) -> None:
    """Fill every param of this rank; no communication. ValueError names what does not fit.

    `tensor`, `expert_tensor`: this rank's place and the size of its tensor-parallel group, and of
    the one that its experts are cut over.
    """
    checkpoint = HFCheckpoint(directory, shape)
    table = rule_by_name(shape)
    for name, param in named_params(chunks):
        rule = table[name]
        parts = [checkpoint[hf_name] for hf_name in rule.hf]
        for hf_name, part, wanted in zip(rule.hf, parts, hf_shapes(rule, shape), strict=True):
            if tuple(part.shape) != wanted:
                raise ValueError(
                    f"{directory}: {hf_name}: found shape {tuple(part.shape)}, expected {wanted} "
                    "from config.json"
                )
        rank, size = expert_tensor if rule.expert else tensor
        param.copy_(cut(rule, merge(rule, parts, shape), shape, rank=rank, size=size))
        _mark_tensor_parallel(param, rule.tp_dim)


def _mark_tensor_parallel(param: torch.Tensor, dim: int | None) -> None:
    """Say that `param` is one of several shards. Megatron does so only where it initialises weights
    itself (`perform_initialization`); without the mark, the gradient norm takes the shards of all
    tensor-parallel ranks but the first for duplicates, and clips by a norm that is too small."""
    param.tensor_model_parallel = dim is not None  # type: ignore[attr-defined]
    param.partition_dim = -1 if dim is None else dim  # type: ignore[attr-defined]
    param.partition_stride = 1  # type: ignore[attr-defined]
