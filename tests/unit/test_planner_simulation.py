"""One train step simulated rollout by rollout, against hand-made sums and steps that were measured.

Not exercised: an engine's real speed, which is the planner's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner.accuracy import step_of
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.models import QWEN2_5_7B, QWEN3_30B_A3B
from sfpo_megatron.planner.scaling import base_config
from sfpo_megatron.planner.simulate import (
    SPREAD,
    cost_of_sfpo,
    decoding_seconds,
    hidden_passes,
    response_lengths,
    simulate,
)
from sfpo_megatron.planner.time import (
    Decoder,
    StepSeconds,
    Workload,
    decoder,
    generation_seconds,
)

OVERLAP = Path(__file__).parents[2] / "benchmarks/results/overlap.json"
H100 = GPUS["h100-80gb"]
IDLE = Decoder(
    dense_s=0, experts_s=0, idle_share=0, context_s=0, token_s=0, prompt_s=0, kv_tokens=1000
)


def engine(**costs: float) -> Decoder:
    """One whose steps cost nothing else."""
    return dataclasses.replace(IDLE, **costs)


@pytest.mark.parametrize(
    ("costs", "lengths", "room", "seconds"),
    [
        ({"dense_s": 1}, [1, 3], 2, 3),
        ({"dense_s": 1}, [1, 3], 1, 4),
        ({"dense_s": 1}, [3, 2, 2], 2, 4),  # the third takes the second's place: steps 3 and 4
        ({"token_s": 1}, [3, 2, 2], 2, 7),
        ({"prompt_s": 1}, [3, 2, 2], 2, 6),  # three prompts of two tokens
        ({"context_s": 1}, [1, 3], 2, (2 + 2) + 3 + 4),
        ({"context_s": 1}, [1, 3], 1, 2 + (2 + 3 + 4)),
        ({"experts_s": 1, "idle_share": 0.5}, [1, 3], 2, 0.75 + 0.5 + 0.5),
    ],
)
def test_decoding_by_hand(
    costs: dict[str, float], lengths: list[int], room: int, seconds: float
) -> None:
    """Prompts of two tokens."""
    assert decoding_seconds(engine(**costs), lengths, 2, room) == pytest.approx(seconds)


def token_by_token(costs: Decoder, lengths: Sequence[int], prompt: int, room: int) -> float:
    """The same, a decoding step at a time."""
    waiting, running = list(lengths), list[tuple[int, int]]()  # (tokens had, tokens to come)
    seconds = len(lengths) * prompt * costs.prompt_s
    while waiting or running:
        while waiting and len(running) < room:
            running.append((prompt, waiting.pop(0)))
        seconds += costs.weights_s(len(running)) + len(running) * costs.token_s
        seconds += sum(had for had, _ in running) * costs.context_s
        running = [(had + 1, left - 1) for had, left in running if left > 1]
    return seconds


@pytest.mark.parametrize("seed", range(8))
def test_decoding_is_what_every_token_comes_to(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(1, 40) for _ in range(source.randint(1, 30))]
    costs = engine(
        dense_s=0.3, experts_s=0.2, idle_share=0.9, context_s=0.01, token_s=0.02, prompt_s=0.004
    )
    for room in (1, 3, 50):
        expected = token_by_token(costs, lengths, 7, room)
        assert decoding_seconds(costs, lengths, 7, room) == pytest.approx(expected, rel=1e-12)


def run() -> RunConfig:
    config = base_config()
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(data=8),
        train=dataclasses.replace(config.train, prompts_per_step=64),
        rollout=dataclasses.replace(config.rollout, num_engines=8),
    )


@pytest.mark.parametrize("shape", [QWEN2_5_7B, QWEN3_30B_A3B], ids=["dense", "experts"])
def test_equal_lengths_are_the_planners_own_sum(shape: ModelShape) -> None:
    """But for half a token of context: a sequence's first step reads its prompt alone."""
    work = Workload(mean_prompt=200, mean_response=500, longest_response=500)
    costs = decoder(shape, run(), H100)
    room = int(costs.room_for(work))
    assert room >= 128
    found = decoding_seconds(costs, [500] * 128, 200, room)
    half = 128 * 500 * costs.context_s / 2
    assert found + half == pytest.approx(generation_seconds(shape, run(), H100, work), rel=1e-12)


def test_lengths_are_as_stated() -> None:
    far = response_lengths(Workload(mean_prompt=1, mean_response=100, longest_response=10**6), 4096)
    assert statistics.fmean(far) == pytest.approx(100, rel=0.05)
    tenth, median = sorted(far)[-410], statistics.median(far)
    assert tenth / median == pytest.approx(math.exp(1.2816 * SPREAD), rel=0.05)
    cut = response_lengths(Workload(mean_prompt=1, mean_response=600, longest_response=1000), 4096)
    assert statistics.fmean(cut) == pytest.approx(600, rel=0.02)
    assert min(cut) >= 1 and max(cut) == 1000 and cut.count(1000) > 400
    with pytest.raises(ValueError, match=r"mean response: found 10, expected .* the longest, 10;"):
        response_lengths(Workload(mean_prompt=1, mean_response=10, longest_response=10), 1)


def test_the_slowest_engine_is_waited_for() -> None:
    """Long tails cost time; what the trainer does takes as long as before."""
    found = []
    for longest in (600, 1024, 4096):
        work = Workload(mean_prompt=200, mean_response=500, longest_response=longest)
        step = simulate(QWEN2_5_7B, run(), H100, work)
        costs, lengths = decoder(QWEN2_5_7B, run(), H100), response_lengths(work, 64 * 16)
        room = int(costs.room_for(work))
        parts = [decoding_seconds(costs, lengths[i::8], 200, room) for i in range(8)]
        assert step.generation == max(parts) > min(parts)
        found.append(step)
    assert found[0].generation < found[1].generation < found[2].generation
    assert found[0].passes == found[1].passes == found[2].passes


def test_passes_behind_generation_by_hand() -> None:
    """Four passes of 2 s after a second of log-probs and one of reposition: 10 s of generation."""
    step = StepSeconds(generation=10, logprobs=1, passes=8, reposition=1, refit=2)
    assert hidden_passes(step, 4) == 4
    assert hidden_passes(dataclasses.replace(step, generation=9.9), 4) == 3
    assert hidden_passes(dataclasses.replace(step, generation=1), 4) == 0
    assert cost_of_sfpo(step, 4, async_steps=0) == pytest.approx((10 + 10 + 2) / (10 + 3 + 2))
    assert cost_of_sfpo(step, 4, async_steps=1) == pytest.approx(1)
    short = dataclasses.replace(step, generation=4)
    assert cost_of_sfpo(short, 4, async_steps=1) == pytest.approx((10 + 2) / (4 + 2))


def test_measured_steps_are_their_phases() -> None:
    """Two cores: with their own phases within 2%; what async 0 foresees of async 1 is too little,
    as both slow each other, but within 20%."""
    alone, beside = json.loads(OVERLAP.read_text())["rows"]
    assert (alone["async_steps"], beside["async_steps"]) == (0, 1)
    assert step_of(alone, async_steps=0).total == pytest.approx(alone["step_s"], rel=0.02)
    assert step_of(beside, async_steps=1).total == pytest.approx(beside["step_s"], rel=0.02)
    foreseen = step_of(alone, async_steps=1).total
    assert 0.8 * beside["step_s"] < foreseen < beside["step_s"]
