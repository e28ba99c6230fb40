"""The tiny model's directory: what transformers loads back is what was made.

Not exercised: Megatron and vLLM on it (tests/dist, tests/e2e).
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from made.configs import AIW
from made.hf import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sfpo_megatron.outputs.owned import MARKER
from tools import make_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "text",
    [
        "Calculate 1 + 2 + 3 + 4.",
        "  spaces   and\ttabs\n\nand lines ",
        "digits 0123456789",
        "héllo wörld 日本 🙂 ٤٢",
        "",
        "a<b>c",
    ],
)
def test_text_round_trips(directory, text):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_vocabulary(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]  # the loader added nothing
    assert len(tokenizer) % 2 == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == config["eos_token_id"]
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == list("1234")
    assert len(tokenizer(" sisters")["input_ids"]) == 1  # a word of the task is one token


def test_same_seed_same_bytes_other_seed_other_weights(directory, tmp_path):
    again, other = (
        make_tiny(tmp_path / "again"),
        make_tiny(tmp_path / "other", "--seed", "1"),
    )
    for file in directory.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    assert (directory / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    weights = directory / "model.safetensors"
    assert weights.read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("tied", ["--tied", "--untied"])
def test_architectures(tmp_path, arch, tied):
    out = make_tiny(tmp_path, "--arch", arch, tied)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == arch
    assert len(tokenizer) == model.config.vocab_size
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared == (tied == "--tied" and arch != "deepseek_v3")
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():  # a sensible scale: nearly uniform, neither dead nor saturated
        logits = model(**tokenizer("Calculate 1 + 2.", return_tensors="pt")).logits
    assert torch.isfinite(logits).all() and 0 < logits.std() < 2


def test_what_an_earlier_version_made_is_adopted(directory, tmp_path, capsys):
    """It left no marker. The same model is replaced by itself; with another seed it stays, and the
    error has the command that makes room; so does a foreign file."""
    out = tmp_path / "model"
    shutil.copytree(directory, out)
    (out / MARKER).unlink()
    args = ["--out", str(out), "--config", str(AIW)]
    (out / "notes.txt").write_text("mine")
    assert make_tiny_model.main(args) == 2
    err = capsys.readouterr().err
    assert "notes.txt" in err and "mv " not in err and not (out / MARKER).exists()
    (out / "notes.txt").unlink()
    assert make_tiny_model.main([*args, "--seed", "1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.endswith(f"(of an earlier version of this tool? mv {out} {out}.old)")
    weights = directory / "model.safetensors"
    assert (out / weights.name).read_bytes() == weights.read_bytes()
    assert make_tiny_model.main(args) == 0
    assert (out / MARKER).is_file() and (out / weights.name).read_bytes() == weights.read_bytes()
