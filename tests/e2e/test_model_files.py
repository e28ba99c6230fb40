"""An engine takes the files that the trainer takes, whatever lies beside them.

Reference: transformers. Not exercised: sharded files (vLLM reads a list of files either way).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import assert_is_model, refit, rollouts
from safetensors.torch import save_file

from sfpo_megatron.families.weight_files import LOAD_FORMAT
from sfpo_megatron.resharding.transports import register


@pytest.mark.parametrize("auto", [False, True], ids=["ours", "vllm"])
def test_first_weights_are_the_listed_files(tmp_path: Path, auto: bool) -> None:
    """What our loader gives an engine is what the trainer loads; vLLM's own takes the others."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    register()
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    loader = get_model_loader(LoadConfig(load_format="auto" if auto else LOAD_FORMAT))
    assert isinstance(loader, DefaultModelLoader)
    source = DefaultModelLoader.Source(str(tmp_path), None)
    found = dict(loader._get_weights_iterator(source))
    assert found.keys() == ({"c"} if auto else tensors.keys())
    assert auto or all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.full
def test_engine_reads_the_listed_files(start: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """A tied model whose file repeats the embedding as its head, beside files of other weights:
    it generates with the right ones, and takes a refit."""
    model = tmp_path / "model"
    shutil.copytree(models["tied_a"], model)
    tensors = tiny.load_state(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    others = tiny.load_state(models["tied_b"])
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "z.safetensors"):
        save_file(others, model / name, metadata={"format": "pt"})
    (model / "params.json").write_text("{}")
    torch.save(others, model / "pytorch_model.bin")
    client = start(model)
    client.wait_ready(300)
    assert_is_model(rollouts(client), models["tied_a"])
    refit(client, models["tied_b"], 1, tmp_path)
    assert_is_model(rollouts(client), models["tied_b"])
