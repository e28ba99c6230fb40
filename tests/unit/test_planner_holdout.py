"""The rows that the planner was not fitted to, and what docs/scaling.md says of them."""

from __future__ import annotations

import dataclasses
import re
import statistics

import pytest

from sfpo_megatron.planner.accuracy import MISS, error, held_out
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.holdout import BOUNDS, HELD_OUT
from sfpo_megatron.planner.models import QWEN3_30B_A3B
from sfpo_megatron.planner.published import PUBLISHED, Published
from sfpo_megatron.planner.time import num_gpus, step_seconds

ALL = (*PUBLISHED, *HELD_OUT, *BOUNDS)


def named(name: str) -> Published:
    (found,) = (run for run in HELD_OUT if name in run.name)
    return found


@pytest.mark.parametrize("run", HELD_OUT, ids=lambda run: run.name)
def test_misses_alone_are_explained(run: Published) -> None:
    missed = {figure for figure in run.figures if abs(error(run, figure)) > MISS}
    assert set(run.misses) == missed


def test_rows_are_apart_from_those_of_the_fit() -> None:
    names = [run.name for run in ALL]
    assert len(set(names)) == len(names)
    assert (len(PUBLISHED), len(HELD_OUT), len(BOUNDS)) == (3, 14, 6)
    assert all(run.source and run.assumed for run in ALL)


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.name)
def test_the_layout_is_of_the_named_gpus(run: Published) -> None:
    """And its experts divide over the ranks of a stage, as its layers over stages."""
    count = re.search(r"(\d+)(?: \+ \d+)? (?:H100|H20|GPUs)", run.name)
    assert count is not None and num_gpus(run.config) == int(count[1])
    parallel = run.config.parallel
    assert run.shape.num_heads % parallel.tensor == 0
    if run.shape.moe is not None:
        assert run.shape.moe.num_experts % parallel.expert == 0
        assert parallel.data * parallel.tensor % parallel.expert == 0


def test_a_rate_is_the_same_work_in_seconds() -> None:
    """240.5 TFLOP/s a GPU over 256 rows of 4096 tokens, by the textbook's count."""
    tokens, layers, heads, head_dim = 256 * 4096, 48, 32, 128
    hidden, vocab = 2048, 151936
    attention = hidden * head_dim * (2 * heads + 2 * 4)
    experts = 3 * hidden * 768 * 8 + hidden * 128
    matrices = layers * (attention + experts) + hidden * vocab
    causal = 2 * 4096 / 2 * heads * head_dim * layers  # half of q k^T, half of weights times v
    flops = 6 * tokens * (matrices + causal)
    seconds = named("Megatron-LM, Qwen3-30B-A3B").figures["passes"]
    assert flops / (32 * seconds) == pytest.approx(240.5e12, rel=1e-3)


def test_a_ratio_is_of_two_steps_that_differ_in_passes() -> None:
    run = named("R1-Distill-Qwen-7B")
    grpo = step_seconds(run.shape, run.config, GPUS[run.gpu], run.work)
    assert grpo.reposition == 0 and grpo.handover > 0
    ratio = run.predicted("ratio")
    assert ratio == pytest.approx(1 + 3 * grpo.passes / grpo.total, rel=2e-3)


def test_experts_share_a_node_whatever_tensor_parallelism_is() -> None:
    """Eight ranks that share experts have NVLink between them; with two halves of each expert they
    are sixteen, and the network is between them."""
    run = named("SkyRL, Qwen3-30B-A3B")

    def passes(**parallel: int) -> float:
        config = dataclasses.replace(
            run.config, parallel=dataclasses.replace(run.config.parallel, **parallel)
        )
        return step_seconds(QWEN3_30B_A3B, config, GPUS[run.gpu], run.work).passes

    assert passes(expert_tensor=2) > 1.3 * passes()
    # As many ranks on more nodes: what they wait for grows; in a node it does not.
    assert passes(expert=16) > 1.3 * passes(expert=8)
    assert passes(expert=8) < 1.1 * passes(expert=4)


def test_the_page_has_every_row_and_their_median() -> None:
    text = "\n".join(held_out())
    rows = re.findall(r"^\| (.+?) \| .+ \| [\d.]+ \| [\d.]+ \| ([+-]\d+)% \|$", text, re.MULTILINE)
    assert len(rows) == sum(len(run.figures) for run in HELD_OUT)
    median = statistics.median(abs(int(percent)) for _, percent in rows)
    assert f"**{median:.0f}%**" in text
    for run in BOUNDS:
        verdict = "yes" if run.predicted("total") < run.figures["total"] else "no"
        assert re.search(rf"^\| {re.escape(run.name)} .*\| {verdict} \|$", text, re.MULTILINE)
