"""Weights alone, by Megatron-LM, the converter or a warm start: are they those of model.path?

That a run asks before an engine starts: test_resume_starts.py; what Megatron makes of others:
tests/dist/test_checkpoint.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.hf import make_hf

from sfpo_megatron.checkpoints.remembered_shape import KEY
from sfpo_megatron.checkpoints.store import RUN_STATE, CheckpointError, named_at
from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.convert.to_megatron import hf_to_megatron
from sfpo_megatron.run.same_model import hold_weights_to_model, print_of


def hold(model: Path, checkpoint: Path) -> None:
    config: Any = SimpleNamespace(model=SimpleNamespace(path=str(model)))
    hold_weights_to_model(config, named_at(checkpoint))


def test_weights_of_the_model_and_of_others(tmp_path: Path) -> None:
    """A padded vocabulary is no other model; a short one would be filled up with zeros."""
    model, checkpoint = make_hf(tmp_path / "model"), tmp_path / "megatron"
    hf_to_megatron(model, checkpoint, ParallelConfig(tensor=2))
    hold(model, checkpoint)
    for name, changes, found in (
        ("longer", {"vocab_size": 103}, r"word_embeddings.weight: found shape \(102, 48\)"),
        ("untied", {"tie_word_embeddings": False}, "no key for output_layer.weight"),
        ("llama", {"architectures": ["LlamaForCausalLM"]}, "no rule for key .*linear_qkv.bias"),
    ):
        with pytest.raises(CheckpointError, match=found):
            hold(make_hf(tmp_path / name, **changes), checkpoint)


def test_weights_of_a_warm_start_of_another_model(tmp_path: Path) -> None:
    """It has the same sizes: every tensor fits, and it computes otherwise."""
    model, other = make_hf(tmp_path / "model"), make_hf(tmp_path / "other", rope_theta=1e4)
    hf_to_megatron(model, tmp_path / "megatron", ParallelConfig())
    release = tmp_path / "megatron/release"
    (release / RUN_STATE).write_text(json.dumps({"step": 3, KEY: print_of(str(model))}))
    hold(model, release)
    with pytest.raises(CheckpointError, match=r"found rope_base 10000.0, expected 500000.0 .*set"):
        hold(other, release)
