"""What is handed to vLLM and Megatron-Core: names and types from their sources, contradictions.

Not exercised here: that they accept every value whose type is right.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from made.configs import run_check, run_config
from made.signatures import read

from sfpo_megatron.config import check
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules.one_model import AS_IN_THE_MODEL, one_model
from sfpo_megatron.config.rules.optimizer_modes import OPTIMIZERS
from sfpo_megatron.config.rules.passed_through import CLASSES
from sfpo_megatron.config.upstream import accepts, fields_of

ENGINE, CORE = "rollout.engine_args", "megatron.transformer"
REFUSED = {  # override -> key, found, expected, fix
    f"{ENGINE}.max_model_len=95": (
        "max_model_len", "95", "at least 96 (rollout.max_prompt_tokens", "remove it"),
    f"{ENGINE}.max_num_seqs=0": ("max_num_seqs", "0", "1 or more", "raise or remove it"),
    f"{ENGINE}.block_size=0": ("block_size", "0", "1 or more", "raise"),
    f"{ENGINE}={{max_num_batched_tokens: 128, max_num_seqs: 256}}": (
        "max_num_batched_tokens", "128", "at least max_num_seqs (256)", "lower max_num_seqs"),
    f"{ENGINE}={{enable_chunked_prefill: false, max_num_batched_tokens: 90}}": (
        "max_num_batched_tokens", "90 with prompts", "at least 96", "raise or remove it"),
    f"{ENGINE}.tokenizer_mode=slow": ("tokenizer_mode", "'slow'", "no such key", "token ids"),
    f"{ENGINE}.data_parallel_size=2": (
        "data_parallel_size", "2", "no such key", "set rollout.num_engines"),
    f"{ENGINE}.pipeline_parallel_size=2": (
        "pipeline_parallel_size", "2", "no such key", "set rollout.tensor_parallel"),
    f"{ENGINE}.runner=pooling": ("runner", "'pooling'", "no such key", "an engine generates"),
    f"{ENGINE}.enable_lora=true": ("enable_lora", "True", "no such key", "all weights"),
    f"{ENGINE}.max_num_seq=4": (
        "max_num_seq", "AsyncEngineArgs of the installed vllm does not have", "one of its fields",
        "did you mean max_num_seqs?"),
    f"{ENGINE}.tp=2": ("tp", "does not have", "one of its fields", "rollout.tensor_parallel?"),
    f"{ENGINE}.enforce_eager=yes please": (
        "enforce_eager", "'yes please' (str)", "bool, the type", "correct the value"),
    f"{ENGINE}.max_num_seqs=many": ("max_num_seqs", "'many'", "int | None", "correct"),
    f"{ENGINE}.block_size='32'": ("block_size", "'32' (str)", "int | None", "correct"),
    f"{ENGINE}.swap_space=four": ("swap_space", "does not have", "one of its fields", "check"),
    f"{CORE}.recompute_granularit=full": (
        "recompute_granularit", "MLATransformerConfig of the installed megatron", "one of",
        "did you mean recompute_granularity?"),
    f"{CORE}.gradient_checkpointing=true": (
        "gradient_checkpointing", "does not have", "one of", "recompute_granularity?"),
    f"{CORE}.recompute_granularity=all": (
        "recompute_granularity", "'all' (str)", "Literal['full', 'selective']", "correct"),
    f"{CORE}.recompute_num_layers=[1]": ("recompute_num_layers", "[1]", "int", "correct"),
    f"{CORE}.recompute_num_layers=true": ("recompute_num_layers", "True", "int", "correct"),
    f"{CORE}.moe_permute_fusion=maybe": ("moe_permute_fusion", "'maybe'", "bool", "correct"),
    "megatron.ddp.overlap_grad_reduc=true": (
        "overlap_grad_reduc", "DistributedDataParallelConfig of", "one of", "overlap_grad_reduce?"),
    "megatron.ddp.bucket_size=big": ("bucket_size", "'big'", "int", "correct"),
    "megatron.optimizer.learning_rate=1": (
        "learning_rate", "OptimizerConfig of", "one of", "did you mean train.optimizer.lr?"),
    "megatron.optimizer.decoupled_lr=1e-5": ("decoupled_lr", "1e-05", "no such", "told apart"),
    f"{CORE}.moe_expert_capacity_factor=1.0": (
        "moe_expert_capacity_factor", "1.0", "no such key", "remove it: the engine drops no token"),
    "megatron.optimizer.decoupled_min_lr=0.1": (
        "decoupled_min_lr", "0.1", "no such key", "cannot be told apart"),
    "megatron.optimizer.min_lr=1e-7": (
        "min_lr", "1e-07", "no such key", "set train.optimizer.lr_floor"),
    "megatron.optimizer.min_loss_scale=small": ("min_loss_scale", "'small'", "float", "correct"),
    f"{CORE}.pipeline_dtype=float32": ("pipeline_dtype", "'float32'", "no such", "set model.dtype"),
}  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_refused(here: Path, override: str) -> None:
    name, found, expected, fix = REFUSED[override]
    with pytest.raises(ConfigError) as caught:
        run_check(override)
    error = caught.value
    assert error.key.rpartition(".")[2] == name and error.key.startswith(override.split("=")[0][:8])
    assert found in error.found and expected in error.expected and fix in error.fix


OTHER_MODELS = (  # name, another value, the one of all models
    *(("hidden_dropout", 0.1, 0.0), ("attention_dropout", 0.1, 0.0)),
    *(("normalization", "LayerNorm", "RMSNorm"), ("layernorm_zero_centered_gamma", True, False)),
    *(("add_bias_linear", True, False), ("gated_linear_unit", False, True)),
    *(("softmax_scale", 0.5, None), ("softmax_type", "off-by-one", "vanilla")),
    *(("qk_clip", True, False), ("qk_l2_norm", True, False), ("no_rope_freq", 4, None)),
    *(("moe_router_force_load_balancing", True, False), ("moe_input_jitter_eps", 0.01, None)),
    *(("mtp_num_layers", 1, None), ("glu_linear_offset", 1.0, 0.0)),
)


@pytest.mark.parametrize(("name", "other", "ours"), OTHER_MODELS)
def test_another_function_of_the_same_weights(
    here: Path, name: str, other: object, ours: object
) -> None:
    """The trainer alone would have it: silently before the first comparison of log-probs."""
    with pytest.raises(ConfigError) as caught:
        run_check(f"{CORE}={json.dumps({name: other})}")
    assert caught.value.key == f"{CORE}.{name}" and f"{ours!r}, as in" in caught.value.expected
    assert run_check(f"{CORE}={json.dumps({name: ours})}") == []


@pytest.mark.parametrize(
    "setting",
    [
        *("layernorm_epsilon=1.0", "window_size=[4, 0]", "qk_layernorm=true", "kv_channels=32"),
        *("num_query_groups=1", "ffn_hidden_size=64", "rotary_interleaved=true"),
        *("rotary_percent=0.5", "add_qkv_bias=true", "beta_fast=1.0"),
    ],
)
def test_what_config_json_says(here: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"found .*no such key.*the model's config\.json"):
        run_check(f"{CORE}.{setting}")


@pytest.mark.parametrize("format", ["dummy", "auto", "mistral"])
def test_engines_load_what_the_trainer_reads(here: Path, format: str) -> None:
    """`dummy` is random weights, which `eval` would judge."""
    with pytest.raises(ConfigError, match="the files that the trainer reads"):
        run_check(f"{ENGINE}.load_format={format}")


def test_the_names_are_megatrons() -> None:
    """Those of one release or the other, by the tables of what they have."""
    key = "megatron.core.transformer:MLATransformerConfig"
    tables = [read("megatron-core", version)[key] for version in ("0.16.1", "0.19.2")]
    known = {field.partition("=")[0] for fields in tables for field in fields}
    assert set(AS_IN_THE_MODEL) <= known
    assert {"use_mup", "hidden_dropout"} <= known


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_mup", True), ("moe_mlp_glu_interleave_size", 32), ("moe_router_force_biased", 0.1)],
)
def test_another_function_in_a_newer_release(name: str, value: object) -> None:
    """use_mup divides the logits of attention by head_dim, not by its root, at any width. By the
    rule itself: the release that is installed may not have the field."""
    (problem,) = one_model(run_config(megatron={"transformer": {name: value}}))
    assert problem.key == f"{CORE}.{name}" and problem.level == "error"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("moe_single_grouped_weight", "no table of names"),
        ("mla_down_proj_fusion", "no table of names"),
        ("use_grouped_gemm_for_shared_expert", "no table of names"),
        ("gtp_weight_remat_size", "parallel.tensor"),
    ],
)
def test_weights_that_no_table_has(here: Path, name: str, instead: str) -> None:
    """In megatron-core 0.19: a KeyError, or other sizes of tensors, where the model is loaded."""
    with pytest.raises(ConfigError) as caught:
        run_check(f"{CORE}.{name}=true")
    assert caught.value.key == f"{CORE}.{name}" and instead in caught.value.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("ddp.use_megatron_fsdp", True), ("ddp.fp8_param_gather", True)),
        *(("optimizer.optimizer", "muon"), ("optimizer.optimizer", "lion")),
        ("optimizer.overlap_param_gather_with_optimizer_step", True),
        ("optimizer.reuse_grad_buf_for_mxfp8_param_ag", True),
        *(("transformer.fp8_param", True), ("transformer.fp4_param", True)),
    ],
)
def test_modes_of_the_optimizer_that_sfpo_refuses(here: Path, key: str, value: object) -> None:
    """Before an engine starts: the optimizer that is built would say so a model's loading later."""
    with pytest.raises(ConfigError, match=r"expected .* with SFPO; remove it: ") as caught:
        run_check(f"megatron.{key}={json.dumps(value)}")
    assert caught.value.key == f"megatron.{key}"


@pytest.mark.parametrize("setting", ["fp8=hybrid", "fp8=e4m3", "fp4=e2m1"])
def test_formats_that_only_transformer_engine_computes_in(
    here: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Core without it computes in model.dtype, as if nothing had been asked for.

    Not exercised here: a machine that has it.
    """
    local = "model.transformer_impl=local"
    for_gpus = ("rollout.gpu_memory_utilization=0.9", "model.dtype=bfloat16")
    monkeypatch.setattr(check, "has_cuda", lambda: True)
    for words, overrides, arguments in (
        ("without a CUDA device", (), {"on_cpu": True, "for_training": True}),
        ("with model.transformer_impl local", (local,), {"on_cpu": False}),
        ("and no TransformerEngine in this", for_gpus, {"for_training": True}),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            run_check(f"{CORE}.{setting}", *overrides, **arguments)
        assert caught.value.key == f"{CORE}.{setting[:3]}"
    (warning,) = run_check(f"{CORE}.{setting}", *for_gpus, on_cpu=False)
    assert "and no TransformerEngine in this Python" in warning
    assert "requirements/gpu.sh or `sfpo-megatron install gpu`" in warning
    assert run_check(f"{CORE}={{fp8: null, fp4: null, fp8_recipe: mxfp8}}", on_cpu=True) == []


def test_main_params_in_other_dtypes(here: Path) -> None:
    aware = "megatron.optimizer={{use_precision_aware_optimizer: true, main_params_dtype: {}}}"
    with pytest.raises(ConfigError, match=r"main_params_dtype: found 'float16', expected float32"):
        run_check(aware.format("float16"), "model.dtype=bfloat16")
    (warning,) = run_check(aware.format("float32"), "model.dtype=bfloat16")
    assert "no TransformerEngine in this Python" in warning


def test_the_optimizers_are_those_of_the_shards() -> None:
    from sfpo_megatron.mcore.shards.steppers import KINDS

    assert {kind.name: len(kind.moments) for kind in KINDS} == OPTIMIZERS


ACCEPTED = (
    f"{ENGINE}={{max_model_len: 96, max_num_seqs: 4, block_size: 32, enforce_eager: true}}",
    f"{ENGINE}={{max_model_len: -1, max_num_batched_tokens: 96, max_num_seqs: 96}}",
    f"{ENGINE}={{kv_cache_dtype: fp8, speculative_config: null, cudagraph_capture_sizes: [1, 2]}}",
    f"{ENGINE}={{compilation_config: {{level: 3}}, cpu_offload_gb: 4, enable_log_requests: 1}}",
    f"{CORE}={{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}}",
    f"{CORE}={{moe_aux_loss_coeff: 1e-3, init_method_std: 1, recompute_granularity: selective}}",
    "megatron.ddp={overlap_grad_reduce: true, bucket_size: 1000, align_param_gather: 0}",
    "megatron.optimizer={sgd_momentum: 1, loss_scale: null, optimizer: adam}",
)


@pytest.mark.parametrize("override", ACCEPTED)
def test_accepted(here: Path, override: str) -> None:
    assert run_check(override) == []


def test_other_model_than_the_trainers_is_a_warning(here: Path) -> None:
    (warning,) = run_check(f"{ENGINE}.hf_overrides={{rope_theta: 5}}")
    assert "hf_overrides" in warning and "the trainer does not see it" in warning


def test_a_prefix_cache_is_not_reproducible(here: Path) -> None:
    cache = f"{ENGINE}.enable_prefix_caching=true"
    assert run_check(cache) == []
    with pytest.raises(ConfigError, match=r"found True with rollout\.reproducible"):
        run_check(cache, "rollout.reproducible=true")


# ---- the reader of sources ---------------------------------------------------------------------


def test_fields_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases here and elsewhere, by relative and absolute imports, are followed; nothing is run."""
    package = tmp_path / "made_for_fields"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "base.py").write_text("class Base:\n    a: int = 0\n    b: str | None = None\n")
    (package / "sub" / "leaf.py").write_text(
        textwrap.dedent("""
            from dataclasses import dataclass
            from typing import ClassVar, Literal
            from ..base import Base as Root
            from made_for_fields.base import Base
            raise SystemExit('imported')

            @dataclass
            class Middle(Root):
                b: "bool" = False
                c: ClassVar[int] = 3

            @dataclass
            class Leaf(Middle, dict):
                d: Literal['x', 'y'] = 'x'
                def method(self): self.e: int = 3
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    leaf = fields_of("made_for_fields.sub.leaf", "Leaf")
    assert leaf == {"a": "int", "b": "'bool'", "d": "Literal['x', 'y']"}
    assert fields_of("made_for_fields.sub.leaf", "None") is None
    assert fields_of("made_for_fields.none", "Leaf") is None
    assert fields_of("made_for_fields_none", "Leaf") is None


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("bool", [True, 0, 1], ["yes", 2, 0.0, []]),
        ("int", [3, -1], [True, 1.0, "3"]),
        ("float", [3, 0.5], [True, "1e-6"]),
        ("str", ["x"], [1, True, ["x"]]),
        ("Optional[int]", [None, 3], ["x"]),
        ("int | None", [None, 3], ["x"]),
        ("Union[str, List[int]]", ["x", [1]], [1, {}]),
        ("typing.Optional[typing.Literal['a', 'b']]", [None, "a"], ["c", 1]),
        ("'Optional[dict[str, int]]'", [None, {}], ["x", 1]),
        ("Tuple[int, int]", [[1, 2]], ["x", 1]),
        ("SomeClass | None", [None, {}, "x", 1], []),
        ("torch.dtype", ["float32", "bfloat16", "float8_e4m3fn"], ["fp32", "x", "", 1, None]),
        ("Callable[[int], str]", ["x", 1], []),
        ("Literal[A.b, 'c']", ["c", "d"], []),
        ("not ( valid", ["x", 1], []),
    ],
)
def test_types(annotation: str, good: list[object], bad: list[object]) -> None:
    """What cannot be told (classes, names of them) is accepted."""
    assert all(accepts(annotation, value) for value in good)
    assert not any(accepts(annotation, value) for value in bad)


def test_check_stays_free_of_them(here: Path) -> None:
    """Names are read, and neither package is imported."""
    code = f"""if True:
        import sys
        from sfpo_megatron import cli
        assert cli.main(["check", "run.yaml", "{ACCEPTED[0]}", "{ACCEPTED[4]}"]) == 0
        heavy = {{"torch", "vllm", "megatron", "transformers", "ray", "pyarrow"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_well_known_fields_are_found() -> None:
    """Base classes included: the name that a change upstream would move out of sight."""
    for section, names in {
        ENGINE: {"model", "max_num_seqs", "enable_log_requests", "weight_transfer_config"},
        CORE: {"recompute_granularity", "bf16", "kv_lora_rank", "num_layers", "fp8"},
        "megatron.ddp": {"overlap_grad_reduce", "use_distributed_optimizer"},
        "megatron.optimizer": {"lr", "min_lr", "adam_beta1", "use_precision_aware_optimizer"},
    }.items():
        assert names <= set(fields_of(*CLASSES[section]) or {}), section


@pytest.mark.full
@pytest.mark.parametrize("section", CLASSES)
def test_fields_are_the_dataclass_own(section: str) -> None:
    """The reference: dataclasses.fields of the imported class."""
    module, cls = CLASSES[section]
    code = f"""if True:
        import dataclasses, importlib
        cls = getattr(importlib.import_module("{module}"), "{cls}")
        print("fields:", *[field.name for field in dataclasses.fields(cls)])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("fields: ")]
    assert set(line.split()[1:]) == set(fields_of(module, cls) or {})
