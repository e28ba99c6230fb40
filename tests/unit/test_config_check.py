"""Cross-checks: one row a refusal, each with its key, what was found, expected, and the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config import check
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.config.model_files import looks_like_path

BASE: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "model"},
    "data": {
        "train": [{"source": "reasoning_gym", "task": "chain_sum", "size": 100}],
        "eval": [{"source": "reasoning_gym", "task": "chain_sum", "size": 100}],
    },
}


@dataclass(frozen=True)
class Case:
    """Overrides of BASE and changes to the model that must be refused at `key`."""

    key: str
    found: str
    expected: str
    fix: str
    overrides: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None


def case(key: str, found: str, expected: str, fix: str, *overrides: str, **rest: Any) -> Case:
    world_size = rest.pop("world_size", None)
    return Case(key, found, expected, fix, overrides, rest, world_size)


JSONL = "data.train=[{source: jsonl, path: none.jsonl}]"
ROWS = "data.train=[{source: jsonl, path: model/config.json}]"
CASES = {
    # layout
    "heads_by_tp": case(
        "parallel.tensor", "4", "num_attention_heads (6)", "one of 1, 2", "parallel.tensor=4"),
    "kv_heads_by_tp": case(
        "parallel.tensor", "3", "num_key_value_heads (2)", "one of 1, 2", "parallel.tensor=3"),
    "hidden_by_tp": case(
        "parallel.tensor", "2", "hidden_size (193)", "one of", "parallel.tensor=2",
        hidden_size=193, head_dim=32),
    "ffn_by_tp": case(
        "parallel.tensor", "2", "intermediate_size (385)", "one of", "parallel.tensor=2",
        intermediate_size=385),
    "layers_by_pp": case(
        "parallel.pipeline", "3 stages", "num_hidden_layers (4)", "1, 2, 4",
        "parallel.pipeline=3"),
    "layers_by_vpp": case(
        "parallel.pipeline", "2 stages x 4 chunks", "num_hidden_layers (4)", "1, 2, 4",
        "parallel.pipeline=2", "parallel.virtual_pipeline=4"),
    "vpp_without_pp": case(
        "parallel.virtual_pipeline", "2", "null when parallel.pipeline is 1", "set it to null",
        "parallel.virtual_pipeline=2"),
    "context": case(
        "parallel.context", "2", "1", "needs TransformerEngine", "parallel.context=2"),
    "expert": case("parallel.expert", "2", "1", "families are dense", "parallel.expert=2"),
    "expert_tensor": case(
        "parallel.expert_tensor", "2", "1", "families are dense", "parallel.expert_tensor=2"),
    "world_size": case(
        "parallel", "4 ranks", "2 (data 1 x tensor 2", "start that many ranks",
        "parallel.tensor=2", world_size=4),
    "world_size_data_null": case(
        "parallel", "3 ranks", "a multiple of 2", "another number of ranks",
        "parallel.tensor=2", "parallel.data=null", world_size=3),
    "engine_tp": case(
        "rollout.tensor_parallel", "4", "num_attention_heads (6)", "1, 2, 3, 6",
        "rollout.tensor_parallel=4"),
    # batch
    "batch_by_dp": case(
        "train.prompts_per_step", "32 rollouts a minibatch (8 x 8 / 2)",
        "a multiple of parallel.data (3)", "change prompts_per_step",
        "train.prompts_per_step=8", "parallel.data=3"),
    "microbatch_below_one_rollout": case(
        "train.max_tokens_per_microbatch", "64", "(96 tokens", "set it to 96",
        "train.max_tokens_per_microbatch=64"),
    "beyond_positions": case(
        "rollout.max_response_tokens", "564 tokens", "max_position_embeddings (512)", "lower",
        "rollout.max_response_tokens=500"),
    # the model directory
    "path_not_there": case(
        "model.path", "no directory './none'", "a Hugging Face model directory", "correct",
        "model.path=./none"),
    "path_partly_there": case(
        "model.path", "no directory 'model/none'", "model directory", "correct",
        "model.path=model/none"),
    "a_file": case(
        "model.path", "a file, not a directory", "model directory", "folder that holds config",
        "model.path=model/config.json"),
    "no_tokenizer": case(
        "model.path", "no tokenizer.json", "beside config.json", "save_pretrained",
        tokenizer=False),
    "architecture": case(
        "model.path", "architecture MixtralForCausalLM", "Qwen2ForCausalLM", "choose",
        architectures=["MixtralForCausalLM"]),
    "no_architecture": case("model.path", "architecture None", "Qwen2", "choose",
        architectures=None),
    "missing_size": case(
        "model.path", "num_hidden_layers = None", "a positive integer", "restore",
        num_hidden_layers=None),
    "narrow_heads_on_cpu": case(
        "model.path", "head_dim 16", "head_dim >= 32 (vLLM on CPU)", "fewer, wider heads",
        head_dim=16),
    "heads_do_not_divide": case(
        "model.path", "hidden_size 193 with 6 heads", "a whole head_dim", "restore",
        hidden_size=193),
    "quantized": case(
        "model.path", "quantization_config", "unquantized weights", "before quantization",
        quantization_config={"quant_method": "fp8"}),
    "rope": case(
        "model.path", "rope type yarn", "default or llama3", "use a model",
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "rope_transformers_4": case(
        "model.path", "rope type linear", "default or llama3", "use a model",
        rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}),
    "partial_rotary": case(
        "model.path", "partial_rotary_factor 0.5", "the whole head", "choose",
        partial_rotary_factor=0.5),
    "sliding_window": case(
        "model.path", "sliding-window attention", "full attention", "set use_sliding_window",
        use_sliding_window=True),
    "activation": case("model.path", "hidden_act gelu", "silu", "SwiGLU", hidden_act="gelu"),
    "mlp_bias": case("model.path", "mlp_bias", "no MLP bias", "choose", mlp_bias=True),
    "attention_bias": case(
        "model.path", "attention_bias", "beyond the family's own", "choose", attention_bias=True),
    "overlong_buffer": case(
        "objective.overlong.buffer_tokens", "40", "at most rollout.max_response_tokens (32)",
        "shorten the buffer", "objective.overlong.buffer_tokens=40"),
    # files and sections against one another
    "jsonl_not_there": case(
        "data.train.0.path", "no file 'none.jsonl'", "a jsonl file", "correct the path", JSONL,
        "reward.function=last_number"),
    "jsonl_with_gym_reward": case(
        "reward.function", "data.train.0.source jsonl", "only needs the answer", "exact_match",
        ROWS),
    "output_is_a_file": case(
        "output_dir", "a file at 'model/config.json'", "a folder", "choose another",
        "output_dir=model/config.json/x"),
    "output_is_the_model": case(
        "output_dir", "which is model.path", "a folder of its own", "write over the model",
        "output_dir=./model"),
    "train_only_not_there": case(
        "debug.train_only", "no file 'x.safetensors'", "debug.save_rollouts", "correct the path",
        "debug.train_only=x.safetensors"),
    "owned_engine_arg": case(
        "rollout.engine_args.dtype", "'bfloat16'", "no such key here", "set model.dtype",
        "rollout.engine_args.dtype=bfloat16"),
    "remote_code": case(
        "rollout.engine_args.trust_remote_code", "True", "no such key", "never run",
        "rollout.engine_args.trust_remote_code=true"),
    "owned_transformer_arg": case(
        "megatron.transformer.num_layers", "2", "no such key", "the model's config.json",
        "megatron.transformer.num_layers=2"),
    "owned_optimizer_arg": case(
        "megatron.optimizer.lr", "0.1", "no such key", "set train.optimizer.lr",
        "megatron.optimizer.lr=0.1"),
    "offloaded_fp32": case(
        "megatron.optimizer.optimizer_cpu_offload", "true with model.dtype: float32",
        "bfloat16 params", "model.dtype: bfloat16",
        "megatron.optimizer.optimizer_cpu_offload=true"),
    "scaled_moments": case(
        "megatron.optimizer.exp_avg_dtype", "float16 with sfpo.moments: restore", "float32",
        "sfpo.moments: keep", "megatron.optimizer.exp_avg_dtype=float16", "sfpo.moments=restore"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good config (run.yaml) and a good model; no GPU, whatever is here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "has_cuda", lambda: False)
    model_dir()
    Path("run.yaml").write_text(json.dumps(BASE))
    return tmp_path


def run_check(*overrides: str, **arguments: Any) -> list[str]:
    config = load_config("run.yaml", list(overrides))
    return [str(warning) for warning in check_config(config, file="run.yaml", **arguments)]


def test_the_base_of_all_cases_is_fine(here: Path) -> None:
    """Else every case below would pass for the wrong reason."""
    assert run_check(for_training=True) == []


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_refused(here: Path, model_dir: Callable[..., Path], name: str) -> None:
    expected = CASES[name]
    for file in (here / "model").iterdir():
        file.unlink()
    model_dir(**expected.model)
    with pytest.raises(ConfigError) as caught:
        run_check(*expected.overrides, world_size=expected.world_size)
    error = caught.value
    assert (error.file, error.key) == ("run.yaml", expected.key)
    assert expected.found in error.found
    assert expected.expected in error.expected
    assert expected.fix in error.fix
    assert str(error) == (
        f"run.yaml: {error.key}: found {error.found}, expected {error.expected}; {error.fix}"
    )


CLI_CASES = ("heads_by_tp", "layers_by_pp", "batch_by_dp", "path_not_there", "narrow_heads_on_cpu")


@pytest.mark.parametrize("command", ["check", "train", "sft"])
@pytest.mark.parametrize("name", CLI_CASES)
def test_refused_by_the_command_line(
    here: Path,
    model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: str,
) -> None:
    """One line on stderr, exit code 2, nothing started, nothing written."""
    expected = CASES[name]
    model_dir(**expected.model)
    assert cli.main([command, "run.yaml", *expected.overrides]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith(f"error: run.yaml: {expected.key}: found ")
    assert expected.expected in last
    assert out == ""
    assert not (here / "run").exists()


MISSING = {
    "weights": ({"weights": False}, (), "no *.safetensors"),
    "hub_id": ({}, ("model.path=owner/name",), "the hub id 'owner/name'"),
    "data_null": ({}, ("parallel.data=null",), "null with no ranks running"),
}


@pytest.mark.parametrize("name", MISSING)
def test_warning_in_check_error_in_train(
    here: Path, model_dir: Callable[..., Path], name: str
) -> None:
    model, overrides, found = MISSING[name]
    (here / "model/model.safetensors").unlink()
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
    assert run_check(on) == run_check("rollout.top_p=0.9") == []
    (warning,) = run_check(on, "rollout.top_p=0.9")
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


def test_sft_has_its_own_batch(here: Path) -> None:
    overrides = ("sft.examples_per_step=33", "parallel.data=2")
    assert run_check(*overrides) == []
    with pytest.raises(ConfigError, match=r"sft\.examples_per_step"):
        run_check(*overrides, command="sft")


def test_narrow_heads_are_fine_on_a_gpu(
    here: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "has_cuda", lambda: True)
    model_dir(head_dim=16)
    assert run_check() == []


def test_llama3_rope_is_supported(here: Path, model_dir: Callable[..., Path]) -> None:
    model_dir(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0})
    assert run_check() == []


def test_stages_of_different_sizes_are_megatrons_to_check(here: Path) -> None:
    """4 layers on 3 stages: refused (above) unless the first stage's size is given."""
    first = "megatron.transformer.num_layers_in_first_pipeline_stage=2"
    assert not [w for w in run_check("parallel.pipeline=3", first) if "layers" in w]


@pytest.mark.parametrize(
    ("value", "is_path"),
    [
        ("/a/b", True), ("./a", True), ("../a", True), ("~/a", True), ("a/b/c", True),
        ("model/none", True), ("owner/name/", True), ("owner/name", False), ("gpt2", False),
    ],
)  # fmt: skip
def test_path_or_hub_id(here: Path, value: str, is_path: bool) -> None:
    """`model` exists in the folder, so `model/none` is a path; `owner` does not."""
    assert looks_like_path(value) is is_path
