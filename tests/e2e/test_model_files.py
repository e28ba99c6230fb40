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
from safetensors.torch import save_file
from test_refit import assert_is_model, refit, rollouts


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
