"""What `check` warns of, and what it accepts that looks like a refused case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_check
from made.models import LLAMA3_ROPE, MIXTRAL, MOE

from sfpo_megatron.config import check
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.paths import looks_like_path

MISSING = {
    "weights": ({"weights": False}, (), "no *.safetensors"),
    "hub_id": ({}, ("model.path=owner/name",), "the hub id 'owner/name'"),
    "tokenizer": ({"tokenizer": False}, (), "no tokenizer.json"),
    "jsonl": (
        {},
        ("data.train=[{source: jsonl, path: none.jsonl}]", "reward.function=last_number"),
        "no file 'none.jsonl'",
    ),
    "data_null": ({}, ("parallel.data=null",), "null with no ranks running"),
}


@pytest.mark.parametrize("name", MISSING)
def test_warning_in_check_error_in_train(
    here: Path, model_dir: Callable[..., Path], name: str
) -> None:
    model, overrides, found = MISSING[name]
    for file in (here / "model").iterdir():
        file.unlink()
    model_dir(**model)
    (warning,) = run_check(*overrides)
    assert warning.startswith("warning: run.yaml: ")
    assert found in warning
    with pytest.raises(ConfigError, match="found"):
        run_check(*overrides, for_training=True)


def test_missing_shard_of_an_index(here: Path) -> None:
    (here / "model/model.safetensors").unlink()
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = here / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (here / "model/model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="1 of 2 weight files missing") as caught:
        run_check(for_training=True)
    assert "model-00002-of-00002.safetensors" in str(caught.value)


def test_k1_in_the_loss(here: Path) -> None:
    k1 = ("objective.kl.coef=0.1", "objective.kl.estimator=k1")
    assert run_check(*k1, "objective.kl.where=reward") == run_check("objective.kl.coef=0.1") == []
    (warning,) = run_check(*k1)
    assert "objective.kl.estimator: found k1 in the loss" in warning


def test_importance_sampling_beside_top_p(here: Path) -> None:
    on = "objective.importance_sampling.weight=token"
    assert run_check(on) == []
    (warning,) = run_check("rollout.top_p=0.9")
    assert "rollout.top_p: found 0.9" in warning
    (warning,) = run_check(on, "rollout.top_p=0.9")  # the one that says more
    assert "objective.importance_sampling: found on with rollout.top_p 0.9" in warning


def test_other_warnings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    alpha, data, ranks, top_p = (
        run_check("sfpo.alpha=0"),
        run_check("data.eval=[]"),
        run_check("parallel.data=4"),
        run_check("rollout.top_p=0.9"),
    )
    assert "sfpo.num_fast_passes=0 for plain GRPO" in alpha[0]
    assert "there is no eval/accuracy" in data[0]
    assert "4 ranks" in ranks[0]
    assert "found 0.9" in top_p[0] and "logprob_diff" in top_p[0]
    assert run_check("sfpo.alpha=0", "sfpo.num_fast_passes=0") == []


def test_the_generators_log_probs_where_they_serve(here: Path) -> None:
    """Engine and trainer agree, or the difference is corrected for, token by token."""
    asked, weight = "objective.old_logprobs=generator", "objective.importance_sampling.weight=token"
    assert run_check(asked) == run_check(asked, weight) == []
    low = ("model.dtype=bfloat16", "rollout.quantization=fp8_per_channel")
    assert run_check(asked, weight, low[0]) == run_check(asked, weight, *low) == []


def test_a_predicted_trajectory_puts_the_moments_back(here: Path) -> None:
    asked = "sfpo.trajectory=predicted"
    (warning,) = run_check(asked)
    assert "sfpo.moments: found keep with trajectory: predicted, expected restore" in warning
    assert run_check(asked, "sfpo.moments=restore") == []
    assert run_check(asked, "sfpo.num_fast_passes=0") == []


def test_a_gate_that_cannot_close(here: Path) -> None:
    """Four values, the newest among them, are at most sqrt(3) deviations from their mean."""
    high = ("sfpo.entropy_window=4", "sfpo.entropy_zscore_threshold=1.74")
    (warning,) = run_check(*high)
    assert "sfpo.entropy_zscore_threshold: found 1.74 with entropy_window 4" in warning
    assert "at most sqrt(4 - 1) = 1.73" in warning
    assert run_check(high[0], "sfpo.entropy_zscore_threshold=1.73") == []
    assert run_check(high[0], "sfpo.entropy_zscore_threshold=null") == [], "that is said"
    assert run_check(*high, "sfpo.entropy_window_excludes_newest=true") == []
    assert run_check(*high, "sfpo.entropy_relative_threshold=0.1") == []
    assert run_check(*high, "sfpo.num_fast_passes=0") == []


def test_context_parallelism_without_te_ends_a_run_that_starts(here: Path) -> None:
    """A login node may have no TransformerEngine where the job will have one."""
    (warning,) = run_check("parallel.context=2")
    assert "no TransformerEngine in this Python" in warning
    with pytest.raises(ConfigError, match=r"parallel\.context.*requirements/gpu\.sh or `sfpo-"):
        run_check("parallel.context=2", for_training=True)


def test_context_parallelism_without_auxiliary_losses(
    here: Path, model_dir: Callable[..., Path]
) -> None:
    """The model's own coefficient is not taken where another stands in the config."""
    model_dir(**MOE, router_aux_loss_coef=0.001)
    balanced = "moe_router_load_balancing_type: aux_loss, moe_aux_loss_coeff: 0"
    for settings in (balanced, "moe_aux_loss_coeff: 0.01"):  # by nothing, without load balancing
        (warning,) = run_check("parallel.context=2", f"megatron.transformer={{{settings}}}")
        assert "no TransformerEngine in this Python" in warning
    model_dir(**MOE, router_aux_loss_coef=0.0)  # as DeepSeek-V3's
    balanced = "megatron.transformer.moe_router_load_balancing_type=seq_aux_loss"
    (warning,) = run_check("parallel.context=2", balanced)
    assert "no TransformerEngine in this Python" in warning


def test_float16_experts_under_a_constant_loss_scale(
    here: Path, model_dir: Callable[..., Path]
) -> None:
    model_dir(**MOE)
    layout = ("model.dtype=float16", "parallel.expert=2", "parallel.data=2")
    assert not [
        x for x in run_check(*layout, "megatron.optimizer.loss_scale=1024") if "expert" in x
    ]


def test_narrow_heads_are_fine_on_a_gpu(
    here: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "has_cuda", lambda: True)
    model_dir(head_dim=16, architectures=["LlamaForCausalLM"])  # vLLM's Qwen2 reads none
    assert not [line for line in run_check() if "head" in line]


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_positions_are_stretched(here: Path, model_dir: Callable[..., Path], kind: str) -> None:
    """64 times 4: 256 tokens with the prompt are taken, 257 are refused."""
    rope = {"rope_type": kind, "factor": 4.0}
    model_dir(max_position_embeddings=64, rope_parameters=rope)
    assert run_check("rollout.max_response_tokens=192", for_training=True) == []
    with pytest.raises(ConfigError) as caught:
        run_check("rollout.max_response_tokens=193")
    assert caught.value.key == "rollout.max_response_tokens"
    assert "257 tokens" in caught.value.found
    assert "at most 256: the model's max_position_embeddings (64)" in caught.value.expected


def test_another_limit_of_the_length(here: Path, model_dir: Callable[..., Path]) -> None:
    """vLLM takes the least of the lengths that a config.json names."""
    model_dir(max_seq_len=96)
    assert run_check() == []
    model_dir(max_seq_len=95)
    with pytest.raises(ConfigError, match="at most 95, the least of the lengths"):
        run_check()


def test_windows_that_the_engine_has_in_other_layers(
    here: Path, model_dir: Callable[..., Path]
) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8}
    model_dir(**windows, max_window_layers=2)
    with pytest.raises(ConfigError, match="in 4 layers for the engine and in 2 of 4"):
        run_check()
    run_check("debug.train_only=run.yaml")  # no engine
    model_dir(**windows, max_window_layers=0)
    run_check()


def test_a_file_by_which_the_engine_would_quantize(
    here: Path, model_dir: Callable[..., Path]
) -> None:
    (model_dir() / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json"):
        run_check()
    run_check("debug.train_only=run.yaml")  # no engine


MOE_LAYOUTS = {
    "one_rank": (),
    "ep": ("parallel.data=2", "parallel.expert=2"),
    "ep_dp": ("parallel.data=4", "parallel.expert=2"),
    "tp_ep": ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
    "aux": ("megatron.transformer.moe_router_load_balancing_type=aux_loss",),
}


@pytest.mark.parametrize("model", [MOE, MIXTRAL], ids=["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", MOE_LAYOUTS)
def test_layouts_of_experts(
    here: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    name: str,
) -> None:
    """No dense MLP: its size need not divide by anything."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    model_dir(**model, **({"intermediate_size": 385} if model is MOE else {}))
    assert run_check(*MOE_LAYOUTS[name]) == []


def test_llama3_rope_is_supported(here: Path, model_dir: Callable[..., Path]) -> None:
    model_dir(rope_parameters=LLAMA3_ROPE)
    assert run_check() == []


def test_stages_of_different_sizes_are_megatrons_to_check(here: Path) -> None:
    """4 layers on 3 stages: refused (above) unless the first stage's size is given."""
    first = "megatron.transformer.num_layers_in_first_pipeline_stage=2"
    assert not [w for w in run_check("parallel.pipeline=3", first) if "layers" in w]


@pytest.mark.parametrize(
    ("value", "is_path"),
    [
        ("/a/b", True), ("./a", True), ("../a", True), ("a/b/c", True),
        ("model/none", True), ("owner/name/", True), ("owner/name", False), ("gpt2", False),
    ],
)  # fmt: skip
def test_path_or_hub_id(here: Path, value: str, is_path: bool) -> None:
    """`model` exists in the folder, so `model/none` is a path; `owner` does not."""
    assert looks_like_path(value) is is_path


def test_gym_reward_of_rows_of_ones_own_is_a_warning(here: Path) -> None:
    """Such rows may have what the reward needs: `check` cannot know."""
    Path("mine.py").write_text("def rows(source, seed): ...\n")
    own = "data.train=[{source: 'mine:rows'}]"
    (warning,) = run_check(own)
    assert "reward.function" in warning and "data.train.0.source mine:rows" in warning
    assert run_check(own, "reward.function=math") == []


def test_walltime_outside_slurm_is_a_warning(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override = "checkpoint.stop_before_walltime_s=60"
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (warning,) = run_check(override)
    assert "checkpoint.stop_before_walltime_s" in warning and "no effect" in warning
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_check(override) == []
