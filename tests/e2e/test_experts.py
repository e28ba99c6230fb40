"""A mixture of experts through the whole loop: Megatron with EP=2, refit, a live vLLM engine.

Not exercised: engines with tensor or expert parallelism, a GPU's fused experts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import digits
import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent


@pytest.mark.full
@pytest.mark.parametrize("latent", [False, True], ids=["qwen3_moe", "deepseek_v3"])
def test_train_with_expert_parallel(tmp_path: Path, latent: bool) -> None:
    """Before each step the engine has the weights of the last one, bit for bit up to kernels: its
    log-probs are the trainer's. The exported policy has every expert, trained; DeepSeek-V3's biases
    by which experts are chosen are as they came."""
    model = digits.make_model(tmp_path / "model", num_experts=4, latent=latent)
    config = digits.write_config(
        tmp_path, model, parallel={"tensor": 1, "data": 2, "expert": 2}, train={"num_steps": 3}
    )
    digits.train(config)
    steps, _ = digits.read_metrics(tmp_path / "run")
    assert [step["weight_version"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["grad_norm"] > 0 and step["num_skipped_steps"] == 0
        assert step["logprob_diff_mean"] < 1e-4, step
    exported = load_file(tmp_path / "run/hf/model.safetensors")
    original = load_file(model / "model.safetensors")
    assert exported.keys() == original.keys()
    assert sum(".mlp.experts." in name for name in exported) == 2 * (8 if latent else 4) * 3
    for name, tensor in original.items():
        frozen = name.endswith("e_score_correction_bias")
        assert tensor.equal(exported[name]) == frozen, f"{name} was not trained, or was"


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "deepseek_v3", pytest.param("mixtral", marks=pytest.mark.full)]
)
def test_experts_are_packed_anew(tmp_path: Path, kind: str) -> None:
    """Fails without `ShmEngine.forget_expert_kernels`: vLLM on CPU reads plain weights as packed.
    In a process of its own: there is one engine a process."""
    subprocess.run(
        [sys.executable, str(HERE / "experts_engine.py"), str(tmp_path), kind],
        check=True,
        timeout=200,
    )
