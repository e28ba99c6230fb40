"""The examples whose model another command makes: with it, `check` and `plan` take them all.

Those that ship a model's config.json are in test_examples.py. Not exercised here: that they train.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config

ROOT = Path(__file__).parents[2]
FILES = sorted(f for f in ROOT.glob("examples/*/*.yaml") if not (f.parent / "model").is_dir())


TINY = {  # config.json as tools/make_tiny_model.py writes it
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "vocab_size": 101,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}


def test_there_are_some() -> None:
    assert {"demo", "objectives", "your_own"} <= {file.parent.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=[f"{f.parent.name}-{f.stem}" for f in FILES])
def test_check_and_plan(file: Path, after_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder with the examples, as in a checkout; before the model is there, its path is
    named."""
    path = file.relative_to(ROOT).as_posix()
    assert cli.main(["plan", path]) == 2
    assert "model.path: found" in capsys.readouterr().err
    model = Path(load_config(path).model.path)
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(TINY))
    assert cli.main(["check", path]) == 0
    assert cli.main(["plan", path]) == 0
