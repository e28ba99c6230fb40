"""What the converters and the quantizer write, loaded by vLLM; SmolLM2 there and back.

Not exercised here: FP8 a tensor, INT4 and NVFP4 in vLLM (they need a GPU).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7], [30, 31, 32, 33, 34], [90, 12]]


def tool(name: str, *arguments: object, path: Path | None = None) -> str:
    """Standard output of `python tools/NAME.py ARGUMENTS`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(path)] if path else [])])
    }
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def generated(model: Path, recorded: Path, dtype: str = "float32") -> list[Any]:
    """What a fresh engine says to PROMPTS: [prompt, tokens, log-probs] of each."""
    recorded.write_text(json.dumps([[prompt, 16, []] for prompt in PROMPTS]))
    command = [sys.executable, str(Path(__file__).parent / "fresh_engine.py"), str(model)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(recorded), "1", dtype],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers: list[Any] = json.loads(line.removeprefix("ANSWERS "))
    return answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    tool("make_tiny_model", "--out", out, "--config", ROOT / "tests/made/aiw.yaml")
    return out


@pytest.mark.full
def test_vllm_loads_what_was_converted(model: Path, tmp_path: Path) -> None:
    tool("convert_hf_to_megatron", "--hf", model, "--out", tmp_path / "m", "--tp", 2, "--pp", 2)
    tool("convert_megatron_to_hf", "--checkpoint", tmp_path / "m", "--out", tmp_path / "hf")
    expected = generated(model, tmp_path / "prompts.json")
    assert generated(tmp_path / "hf", tmp_path / "prompts.json") == expected


@pytest.mark.full
def test_vllm_loads_what_was_quantized(model: Path, tmp_path: Path) -> None:
    """FP8 a channel and a token: the one that vLLM runs on CPU. Log-probs stay near."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    subprocess.run([*pip, "-r", str(ROOT / "requirements/quant.txt")], check=True, timeout=600)
    out = tmp_path / "fp8"
    arguments = ("--hf", model, "--out", out, "--format", "fp8_per_channel")
    tool("export_quantized", *arguments, path=packages)
    weight = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert weight.dtype == torch.float8_e4m3fn
    quantized, plain = (
        generated(folder, tmp_path / "prompts.json", "bfloat16") for folder in (out, model)
    )
    for (_, tokens, logprobs), (_, _, expected) in zip(quantized, plain, strict=True):
        assert tokens and abs(logprobs[0] - expected[0]) < 0.1


@pytest.mark.full
def test_smollm2_there_and_back(tmp_path: Path) -> None:
    """The real weights, a pretrained model's tokenizer and chat template."""
    tool("get_smollm2", "--out", tmp_path / "model")
    arguments = ("--hf", tmp_path / "model", "--out", tmp_path / "m", "--tp", 3, "--pp", 2)
    tool("convert_hf_to_megatron", *arguments)
    tool("convert_megatron_to_hf", "--checkpoint", tmp_path / "m", "--out", tmp_path / "hf")
    text = tool("inspect_checkpoint", tmp_path / "model", "--diff", tmp_path / "hf")
    assert "equal, bit for bit" in text
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {file.name for file in (tmp_path / "hf").iterdir()}
