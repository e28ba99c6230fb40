"""Hugging Face safetensors straight into tensor-, pipeline- and expert-parallel shards."""

from __future__ import annotations

from pathlib import Path

import torch

from sfpo_megatron.families.hf_files import HFCheckpoint
from sfpo_megatron.families.operations import cut, merge
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import rule_by_name
from sfpo_megatron.mcore.model import named_params


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
        parts = checkpoint.parts(rule)
        rank, size = expert_tensor if rule.expert else tensor
        param.copy_(cut(rule, merge(rule, parts, shape), shape, rank=rank, size=size))
        if not rule.frozen:
            _mark_tensor_parallel(param, rule.tp_dim)


def _mark_tensor_parallel(param: torch.Tensor, dim: int | None) -> None:
    """Say that `param` is one of several shards. Megatron does so only where it initialises weights
    itself (`perform_initialization`); without the mark, the gradient norm takes the shards of all
    tensor-parallel ranks but the first for duplicates, and clips by a norm that is too small."""
    param.tensor_model_parallel = dim is not None  # type: ignore[attr-defined]
    param.partition_dim = -1 if dim is None else dim  # type: ignore[attr-defined]
    param.partition_stride = 1  # type: ignore[attr-defined]
