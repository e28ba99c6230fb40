"""What of a model directory goes along with other weights: into RUN/hf, and through the converters.

That transformers reads the copies is not exercised, but for the folder of chat templates.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sfpo_megatron.families.hf_files import copy_companions
from sfpo_megatron.outputs.exported import companions, exported_names

STALE = (
    *("model.safetensors", "model.safetensors.index.json", "consolidated.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt"),
    *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.onnx_data"),
    *("optimizer.pt", "rng_state.pth", "training_args.bin", "model-q4.gguf"),
)
"""What else lies in published directories and in checkpoints of a transformers Trainer."""


@pytest.mark.parametrize("name", STALE)
def test_no_other_weights_go_along(tmp_path: Path, name: str) -> None:
    """Beside new weights they would be another model's, or gigabytes of an optimizer's state."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{}")
    assert [file.name for file in companions(tmp_path)] == ["config.json"]
    adopts = exported_names(tmp_path)
    assert adopts("config.json") and adopts(name) == (name in STALE[:2])


def test_named_chat_templates_go_along(tmp_path: Path) -> None:
    """transformers keeps all but the default one in a folder, and renders `tool_use` where there
    are tools."""
    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    tokenizer.save_pretrained(source)
    (source / "config.json").write_text("{}")
    out.mkdir()
    copy_companions(source, out, dtype=None)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert exported_names(source)("additional_chat_templates/tool_use.jinja")
    assert not exported_names(source)("additional_chat_templates/mine.jinja")
