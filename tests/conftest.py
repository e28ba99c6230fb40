"""Shared by all tests: one OpenMP thread, and a small model directory with blank weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch

from made.models import MODEL_JSON, TOKENIZER_JSON

# nohup and a shell's background jobs ignore signals, and what is ignored stays so in each process
# that a test starts. What a handler ignores does not.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def write_blank(file: Path, config: dict[str, Any]) -> None:
    """A sparse safetensors file of zeros with the tensors of `config`'s model; of a config.json
    that nothing here trains, one without tensors."""
    from sfpo_megatron.families.shape import model_shape
    from sfpo_megatron.families.table import hf_shapes, rules_of

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    try:
        shape = model_shape(config)
    except ValueError:
        rules = []
    else:
        rules = rules_of(shape)
    for rule in rules:
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True):
            places = [end, end + 4 * math.prod(size)]
            header[name] = {"dtype": "F32", "shape": size, "data_offsets": places}
            end = places[1]
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """`model_dir(hidden_size=64, ...)` -> a directory as `check` reads it; None drops a key."""

    def make(*, weights: bool = True, tokenizer: bool = True, **changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        config = {k: v for k, v in (MODEL_JSON | changes).items() if v is not None}
        name = SUPPORTED_ARCHITECTURES.get(config.get("architectures", [""])[0])
        if name is not None:
            config.setdefault("model_type", name)
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            write_blank(folder / "model.safetensors", config)
        if tokenizer:
            (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
        return folder

    return make
