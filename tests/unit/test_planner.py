"""The planner: arithmetic that needs no Megatron, published figures, the command.

Real allocations stand on the other side in tests/dist/test_planner.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import write_run
from made.models import IDS, SHAPES

from sfpo_megatron.cli import main
from sfpo_megatron.config.objective import KLConfig, ObjectiveConfig
from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.families.table import hf_shapes, rules_of
from sfpo_megatron.planner import hardware
from sfpo_megatron.planner.hardware import GIB, GPUS
from sfpo_megatron.planner.layouts import fits, fullest, recommend
from sfpo_megatron.planner.memory import activation_bytes, engine_memory, num_params, rank_memory
from sfpo_megatron.planner.models import (
    DEEPSEEK_671B,
    DISTILL_1_5B,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B,
    MOONLIGHT_16B,
    QWEN2_5_1_5B,
    QWEN2_5_3B,
    QWEN2_5_7B,
    QWEN3_0_6B,
    QWEN3_4B,
    QWEN3_30B_A3B,
    QWEN3_32B,
    QWEN3_235B_A22B,
)
from sfpo_megatron.planner.params import Buffer, Param, buffer_of, chunks_of
from sfpo_megatron.planner.published import PUBLISHED
from sfpo_megatron.planner.report import report
from sfpo_megatron.planner.scaling import base_config, page
from sfpo_megatron.planner.time import (
    StepSeconds,
    Workload,
    active_params,
    forward_flops,
    step_seconds,
)

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100-80gb"]


def config(**parallel: object) -> RunConfig:
    return dataclasses.replace(base_config(), parallel=ParallelConfig(**parallel))


def test_published_steps_within_30_percent() -> None:
    assert len(PUBLISHED) == 3
    for run in PUBLISHED:
        found = step_seconds(run.shape, run.config, GPUS[run.gpu], run.work)
        assert len(run.figures) >= 3
        for phase, seconds in run.figures.items():
            assert 0.7 <= getattr(found, phase) / seconds <= 1.3, (run.name, phase)


@pytest.mark.parametrize(
    ("shape", "total", "active"),
    [
        (LLAMA_1B, 1.236e9, 1.236e9),
        (LLAMA_8B, 8.03e9, 7.50e9),
        (LLAMA_70B, 70.55e9, 69.5e9),
        (QWEN2_5_1_5B, 1.544e9, 1.544e9),
        (QWEN2_5_3B, 3.086e9, 3.086e9),
        (QWEN2_5_7B, 7.62e9, 7.07e9),
        (DISTILL_1_5B, 1.777e9, 1.544e9),
        (QWEN3_0_6B, 0.596e9, 0.596e9),
        (QWEN3_4B, 4.022e9, 4.022e9),
        (QWEN3_32B, 32.76e9, 31.98e9),
        (QWEN3_30B_A3B, 30.53e9, 3.04e9),
        (QWEN3_235B_A22B, 235.1e9, 21.57e9),
        (DEEPSEEK_671B, 671.03e9, 36.6e9),
        (MOONLIGHT_16B, 15.96e9, 2.58e9),
    ],
)
def test_params_are_those_of_the_model_cards(shape: object, total: float, active: float) -> None:
    """Within 0.3%; DeepSeek-V3 without its multi-token prediction layer."""
    assert num_params(shape) == pytest.approx(total, rel=3e-3)
    assert active_params(shape) == pytest.approx(active, rel=2e-2)


def test_buffers_are_padded_and_dealt_out() -> None:
    """Params in reverse order from multiples of 64, buckets to multiples of lcm(ranks, 128)."""

    def owned(buffer: Buffer) -> tuple[int, int]:
        return buffer.owned(0), buffer.owned(1)

    params = [Param(name="a", numel=100), Param(name="b", numel=70), Param(name="c", numel=10)]
    whole = buffer_of(params, ranks=2, bucket_size=None, sharded=True)
    # c at 0, b at 64, a at 192..292: padded to 384, 192 a rank.
    assert (whole.numel, owned(whole)) == (384, (10 + 70, 100))
    plain = buffer_of(params, ranks=2, bucket_size=None, sharded=False)
    assert (plain.numel, owned(plain)) == (180, (180, 180))
    cut = buffer_of(params, ranks=2, bucket_size=70, sharded=True)
    # A bucket is full at 134 elements (c, b): padded to 256; then a to 128 more.
    assert (cut.numel, owned(cut)) == (384, (10 + 64 + 64, 6 + 36))


def test_every_param_is_owned_once() -> None:
    for layout in ({"data": 4, "tensor": 2}, {"data": 8, "pipeline": 4}, {"data": 3}):
        run = config(**layout)
        total = 0
        for stage in range(run.parallel.pipeline):
            for rank in range(run.parallel.data or 1):
                total += rank_memory(LLAMA_8B, run, stage=stage, data_rank=rank).snapshot // 4
        # Norms are on every tensor-parallel rank.
        norms = (2 * LLAMA_8B.num_layers + 1) * LLAMA_8B.hidden_size
        tensor = run.parallel.tensor
        assert total == (num_params(LLAMA_8B) - norms) // tensor + norms


def test_what_settings_change() -> None:
    run = config(data=8)
    base = rank_memory(LLAMA_8B, run)

    def with_(**changes: object) -> object:
        return rank_memory(LLAMA_8B, dataclasses.replace(run, **changes))

    sfpo, megatron = run.sfpo, run.megatron
    host = with_(sfpo=dataclasses.replace(sfpo, snapshot="host"))
    assert (host.snapshot, host.host) == (0, base.snapshot)
    assert with_(sfpo=dataclasses.replace(sfpo, num_fast_passes=0)).snapshot == 0
    assert with_(sfpo=dataclasses.replace(sfpo, moments="restore")).snapshot == 3 * base.snapshot
    predicted = dataclasses.replace(sfpo, trajectory="predicted", num_fast_passes=10)
    assert with_(sfpo=predicted).snapshot == 2 * base.snapshot
    predicted = dataclasses.replace(predicted, moments="restore")
    assert with_(sfpo=predicted).snapshot == 4 * base.snapshot
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    recomputed = with_(megatron=dataclasses.replace(megatron, transformer=full))
    assert recomputed.activations < base.activations / 5
    some = {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]}
    selective = with_(megatron=dataclasses.replace(megatron, transformer=some))
    assert recomputed.activations < selective.activations < base.activations / 2
    precise = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"}
    precise_memory = with_(megatron=dataclasses.replace(megatron, optimizer=precise))
    assert precise_memory.main_params == base.main_params // 2
    assert precise_memory.optimizer == base.optimizer * 6 // 8
    sgd = dataclasses.replace(megatron, optimizer={"optimizer": "sgd"})
    momentum = with_(megatron=sgd, sfpo=dataclasses.replace(sfpo, moments="restore"))
    assert (momentum.optimizer, momentum.snapshot) == (base.optimizer // 2, 2 * base.snapshot)
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    offloaded = with_(megatron=dataclasses.replace(megatron, optimizer=offload))
    assert offloaded.optimizer == base.optimizer // 2
    assert offloaded.host == (base.main_params + base.optimizer) // 2


@pytest.mark.parametrize("context", [1, 2])
def test_microbatches_of_a_number_of_rollouts(context: int) -> None:
    """They hold that many of the longest, and their time is that of as many of the mean."""
    run = config(data=4, pipeline=2, context=context)
    longest = run.rollout.max_prompt_tokens + run.rollout.max_response_tokens
    work = Workload.guessed(run)
    mean = work.mean_prompt + work.mean_response

    def of(**train: Any) -> RunConfig:
        return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))

    def budget(length: float) -> RunConfig:
        return of(max_tokens_per_microbatch=math.ceil(16 * length / context))

    counted = of(microbatch_size=16)
    assert rank_memory(LLAMA_8B, counted) == rank_memory(LLAMA_8B, budget(longest))
    found, expected = (
        step_seconds(LLAMA_8B, given, H100, work).passes for given in (counted, budget(mean))
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_pipeline_is_never_slower_than_its_stages_in_turn() -> None:
    """Minibatches of one microbatch each leave all stages but one idle, however many they are."""

    def log_probs(pipeline: int, minibatches: int) -> float:
        run = config(data=1, pipeline=pipeline)
        train = dataclasses.replace(
            run.train, minibatches_per_step=minibatches, max_tokens_per_microbatch=10**9
        )
        objective = ObjectiveConfig(kl=KLConfig(coef=0.1))
        run = dataclasses.replace(run, train=train, objective=objective)
        return step_seconds(LLAMA_8B, run, H100, Workload.guessed(run)).logprobs

    for minibatches in (1, 2, 8):
        assert log_probs(4, minibatches) == pytest.approx(log_probs(1, minibatches))


def test_stages_of_different_sizes() -> None:
    settings = {"num_layers_in_first_pipeline_stage": 18, "num_layers_in_last_pipeline_stage": 6}
    run = config(data=1, pipeline=3)
    run = dataclasses.replace(run, megatron=dataclasses.replace(run.megatron, transformer=settings))
    sizes = [len(chunks_of(LLAMA_8B, run, stage)[0].layers) for stage in range(3)]
    assert sizes == [18, 8, 6]


def test_interleaved_chunks() -> None:
    run = config(data=1, pipeline=2, virtual_pipeline=2)
    layers = [[c.layers[0] for c in chunks_of(LLAMA_8B, run, stage)] for stage in range(2)]
    assert layers == [[0, 16], [8, 24]]
    first, last = (
        activation_bytes(LLAMA_8B, run, stage=stage, spec="te", tokens=4096) for stage in (0, 1)
    )
    assert first > last


@pytest.mark.parametrize("window", [3, 8, 50])
@pytest.mark.parametrize("num_windowed", [0, 10, 36])
def test_operations_of_windowed_attention(window: int, num_windowed: int) -> None:
    """By counting, token by token, what each query sees; half a token of its own is not counted."""
    layers, length = QWEN3_4B.num_layers, 40
    windowed = (True,) * num_windowed + (False,) * (layers - num_windowed)
    shape = dataclasses.replace(QWEN3_4B, window=window, windowed=windowed)
    full = sum(place + 0.5 for place in range(length)) / length
    near = sum(min(place + 0.5, window) for place in range(length)) / length
    seen = num_windowed * near + (layers - num_windowed) * full
    heads = shape.num_heads * (shape.head_dim + shape.value_dim)
    attention = forward_flops(shape, length) - 2 * active_params(shape)
    assert attention == pytest.approx(2 * heads * seen, rel=1e-6)


def test_recommended_layout_fits() -> None:
    run = config(data=8)
    work = Workload.guessed(run)
    assert not fits(fullest(LLAMA_70B, run)[1], H100)
    assert recommend(LLAMA_70B, run, H100, 8, work) is None
    option = recommend(LLAMA_70B, run, H100, 64, work)
    assert option is not None and fits(option.memory, H100)
    assert option.config.parallel.data * option.config.parallel.model_size == 64
    assert f"parallel.tensor={option.config.parallel.tensor}" in option.overrides()


def test_generation_beside_training() -> None:
    run = config(data=8)
    work = Workload.guessed(run)
    one = step_seconds(QWEN2_5_7B, run, H100, work)
    rollout = dataclasses.replace(run.rollout, async_steps=1)
    two = step_seconds(QWEN2_5_7B, dataclasses.replace(run, rollout=rollout), H100, work)
    trained = one.logprobs + one.passes + one.reposition
    assert one.total == pytest.approx(one.generation + trained + one.refit)
    assert two.total == pytest.approx(max(one.generation, trained) + one.refit)


def seconds(objective: ObjectiveConfig | None = None, **sfpo: Any) -> StepSeconds:
    """Seconds of a step with four minibatches a pass."""
    run = config(data=8)
    run = dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, minibatches_per_step=4),
        sfpo=dataclasses.replace(run.sfpo, **sfpo),
        objective=objective or ObjectiveConfig(),
    )
    return step_seconds(QWEN2_5_7B, run, H100, Workload.guessed(run))


def test_a_predicted_trajectory_is_three_passes() -> None:
    one, two, ten = (seconds(num_fast_passes=k).passes for k in (1, 2, 10))
    assert (two / one, ten / one) == (pytest.approx(1.5), pytest.approx(5.5))
    for k in (2, 10):
        assert seconds(trajectory="predicted", num_fast_passes=k).passes == two
    more = seconds(trajectory="predicted").reposition
    assert seconds().reposition < more < 2.5 * seconds().reposition


def test_log_probs_that_are_paid_for() -> None:
    """The first of four minibatches has its own, unless a penalty needs all; the generator's cost
    nothing; a reference is another forward."""
    in_reward = seconds(ObjectiveConfig(kl=KLConfig(coef=0.1, where="reward"))).logprobs
    forward = in_reward / 2
    assert forward > 0
    assert seconds().logprobs == pytest.approx(0.75 * forward)
    assert seconds(ObjectiveConfig(kl=KLConfig(coef=0.1))).logprobs == pytest.approx(1.75 * forward)
    assert seconds(ObjectiveConfig(old_logprobs="generator")).logprobs == 0


def colocated(run: RunConfig, **rollout: object) -> RunConfig:
    settings = {"placement": "colocated", "num_engines": 8, **rollout}
    return dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, **settings))


def test_engines_that_share_the_trainers_gpus() -> None:
    """What leaves the device goes to the host; asleep an engine keeps a little; its weights lie
    beside the trainer's state during the refit, when there are no activations."""
    run = config(data=8)
    alone, shared = rank_memory(QWEN2_5_7B, run), rank_memory(QWEN2_5_7B, colocated(run))
    assert shared.host == alone.params + alone.main_params + alone.optimizer
    assert shared.asleep == hardware.AWAY_BYTES
    assert shared.refit == 2 * num_params(QWEN2_5_7B) + run.refit.bucket_bytes
    assert shared.refit < shared.activations + shared.logits
    assert shared.total == alone.total + shared.asleep
    short = rank_memory(QWEN2_5_7B, colocated(run), tokens=1024)
    assert short.refit > short.activations + short.logits
    state = short.params + short.grads + short.main_params + short.optimizer + short.snapshot
    assert short.total == state + short.asleep + short.refit

    work = Workload.guessed(run)
    one, two = (step_seconds(QWEN2_5_7B, r, H100, work) for r in (run, colocated(run)))
    assert one.handover == 0
    assert two.handover == pytest.approx(2 * shared.host / hardware.PCIE_BYTES_PER_S)
    parts = two.generation + two.logprobs + two.passes + two.reposition + two.refit
    assert two.total == pytest.approx(parts + two.handover)


def test_report_of_shared_gpus() -> None:
    run = colocated(config(data=None, tensor=2, sequence=True), gpu_memory_utilization=0.8)
    text = report(QWEN2_5_7B, run, H100, 1)
    assert "8 h100-80gb train and generate in turn: 1 node\n" in text
    assert "handover" in text and "asleep" in text and "\nfits: " in text
    text = report(QWEN2_5_7B, colocated(config(data=8), gpu_memory_utilization=0.98), H100, 1)
    assert "does not fit: rollout.gpu_memory_utilization 0.98" in text and "\nfits: " not in text
    assert "does not fit: stage 0 needs" in text and text.endswith("rollout.num_engines=8\n")
    text = report(LLAMA_70B, colocated(config(data=8), gpu_memory_utilization=0.8), H100, 1)
    assert "does not fit: an engine's weights are 131.4 GiB a GPU" in text
    plain = report(QWEN2_5_7B, config(data=8), H100, None)
    assert "handover" not in plain and "asleep" not in plain


def test_engine() -> None:
    engine = engine_memory(QWEN2_5_7B, config(data=1), 80 * GIB)
    assert engine.weights == 2 * num_params(QWEN2_5_7B)
    assert engine.kv_bytes_per_token == 2 * 4 * 128 * 28 * 2
    assert engine.kv_tokens > 500_000


@pytest.mark.parametrize("shape", [*SHAPES, DEEPSEEK_671B], ids=[*IDS, "deepseek-671b"])
def test_params_are_those_of_the_name_table(shape: ModelShape) -> None:
    """What an optimizer holds; the biases of DeepSeek-V3's router it does not."""
    sizes = [s for rule in rules_of(shape) if not rule.frozen for s in hf_shapes(rule, shape)]
    assert num_params(shape) == sum(math.prod(size) for size in sizes)


def test_page_is_fresh() -> None:
    command = "python -m sfpo_megatron.planner.scaling > docs/scaling.md"
    assert (ROOT / "docs/scaling.md").read_text() == page() + "\n", f"run: {command}"


def test_command(
    model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_dir(weights=False)
    run = write_run(
        tmp_path,
        output_dir=str(tmp_path / "out"),
        model={"path": str(model), "dtype": "bfloat16"},
        parallel={"data": None, "tensor": 2},
    )
    begun = time.process_time()
    assert main(["plan", str(run), "--nodes", "1", "rollout.num_engines=2"]) == 0
    assert time.process_time() - begun < 1.0
    text = capsys.readouterr().out
    assert "6 h100-80gb train, 2 generate: 1 node\n" in text
    for word in ("main params", "snapshot", "activations by recompute", "reposition", "fits"):
        assert word in text
    assert main(["plan", str(run), "model.path=owner/name"]) == 2
    assert "the hub id" in capsys.readouterr().err


def test_does_not_fit_names_a_layout(
    model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    model = model_dir(
        architectures=["LlamaForCausalLM"], num_hidden_layers=80, num_key_value_heads=8, **llama
    )
    assert json.loads((model / "config.json").read_text())["hidden_size"] == 8192
    run = write_run(
        tmp_path,
        output_dir=str(tmp_path / "out"),
        model={"path": str(model), "dtype": "bfloat16"},
        parallel={"data": 8},
    )
    assert main(["plan", str(run)]) == 0
    text = capsys.readouterr().out
    assert "does not fit: stage 0 needs" in text and "parallel.tensor=" in text
