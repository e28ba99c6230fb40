"""Which layers a pipeline stage holds, by Megatron's own count, and which stage is the fullest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from sfpo_megatron.config.rules.pipeline import LAYOUT, pipeline_stages
from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.layouts import fullest
from sfpo_megatron.planner.memory import rank_memory
from sfpo_megatron.planner.models import DEEPSEEK_671B, LLAMA_8B, QWEN3_32B
from sfpo_megatron.planner.params import chunks_of, unlike_stages
from sfpo_megatron.planner.report import report
from sfpo_megatron.planner.scaling import base_config

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING = "account_for_embedding_in_pipeline_split"
LOSS = "account_for_loss_in_pipeline_split"
CASES: dict[str, tuple[int, int, int | None, dict[str, Any]]] = {
    "one stage": (30, 1, None, {}),
    "even": (32, 4, None, {}),
    "even, chunks": (32, 4, 2, {}),
    "first": (30, 4, None, {FIRST: 6}),
    "first, chunks": (30, 4, 2, {FIRST: 6}),
    "last, chunks": (34, 3, 2, {LAST: 10}),
    "both": (32, 3, None, {FIRST: 18, LAST: 6}),
    "both, two stages": (24, 2, None, {FIRST: 18, LAST: 6}),
    "both, chunks": (32, 4, 2, {FIRST: 6, LAST: 2}),
    "embedding": (31, 4, None, {EMBEDDING: True}),
    "loss": (31, 4, None, {LOSS: True}),
    "embedding and loss": (30, 4, None, {EMBEDDING: True, LOSS: True}),
    "embedding and loss, chunks": (30, 4, 2, {EMBEDDING: True, LOSS: True}),
    "embedding, one layer a chunk": (7, 4, 2, {EMBEDDING: True}),
    "by hand": (8, 4, None, {LAYOUT: "Ett|t*3,|(t)*3|L"}),
    "by hand, chunks": (9, 2, 2, {LAYOUT: "E|(tt|)*2t*5L"}),
    "by hand, as lists": (
        3,
        2,
        None,
        {LAYOUT: [["embedding", "decoder"], ["decoder"] * 2 + ["loss"]]},
    ),
}


def run_of(pipeline: int, virtual: int | None, settings: dict[str, Any]) -> RunConfig:
    run = base_config()
    parallel = ParallelConfig(data=1, pipeline=pipeline, virtual_pipeline=virtual)
    megatron = dataclasses.replace(run.megatron, transformer=settings)
    return dataclasses.replace(run, parallel=parallel, megatron=megatron)


@pytest.mark.parametrize("case", CASES)
def test_chunks_are_those_of_megatron(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, pipeline, virtual, settings = CASES[case]
    size = "get_virtual_pipeline_model_parallel_world_size"
    monkeypatch.setattr(parallel_state, size, lambda: virtual)
    theirs = TransformerConfig(
        num_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype="float32",
        **settings,
    )
    shape = dataclasses.replace(LLAMA_8B, num_layers=layers)
    run = run_of(pipeline, virtual, settings)
    for stage in range(pipeline):
        chunks = chunks_of(shape, run, stage)
        parts = [None] if virtual is None else range(virtual)
        if (by_hand := theirs.pipeline_model_parallel_layout) is not None:
            ids = [by_hand.get_layer_id_list(vp_stage=part, pp_rank=stage) for part in parts]
            assert [list(chunk.layers) for chunk in chunks] == ids, stage
            continue
        expected = [
            range(start := get_transformer_layer_offset(theirs, part, stage),
                  start + get_num_layers_to_build(theirs, part, stage))
            for part in parts
        ]  # fmt: skip
        assert [chunk.layers for chunk in chunks] == [tuple(part) for part in expected], stage


DIVIDED: tuple[tuple[int, int | None, dict[str, Any]], ...] = (
    *((4, None, {FIRST: first}) for first in (0, 2, 5, 7)),
    *((2, None, {FIRST: 10, LAST: last}) for last in (10, 22)),
    (3, None, {LOSS: True}),
    (3, None, {EMBEDDING: True}),
    (3, 2, {EMBEDDING: True}),
    (4, 2, {FIRST: 3}),
    (4, 2, {FIRST: 2}),
    (4, 2, {LAST: 6, FIRST: 6}),
    (4, 2, {LAST: 8, FIRST: 4}),
    (1, None, {FIRST: 32}),
    (1, None, {FIRST: 12}),
    (4, None, {FIRST: 8, EMBEDDING: True}),
    (2, None, {LAYOUT: "Et*16|t*16L"}),
    (2, None, {LAYOUT: "Et*16|t*15L"}),
    (2, None, {LAYOUT: "t*16|t*16L"}),
    (2, None, {LAYOUT: "Et*16L|t*16"}),
    (2, None, {LAYOUT: "Ex*16|t*16L"}),
    (2, None, {LAYOUT: "Et*16|t*16L", LAST: 16}),
    (3, None, {LAYOUT: "Et*16|t*16|L"}),
    (2, 2, {LAYOUT: "E(tttttttt|)*3t*8L"}),
    (2, 2, {LAYOUT: "Et*10|t*11|t*11L"}),
    (2, None, {LAYOUT: "Et*10|t*11|t*11L"}),
    (2, None, {LAYOUT: [["Embedding", *["decoder"] * 16], [*["decoder "] * 16, "LOSS"]]}),
    (2, None, {LAYOUT: [["embedding", *["decoder"] * 16], [*["decoder"] * 15, "loss"]]}),
    (2, None, {LAYOUT: [["embedding", *["decoder"] * 32], "loss"]}),
    (2, None, {LAYOUT: [16, 16]}),
    (2, None, {LAYOUT: [None, ["embedding"]]}),
)


@pytest.mark.parametrize("case", DIVIDED, ids=str)
def test_what_megatron_cannot_divide_is_refused(
    case: tuple[int, int | None, dict[str, Any]],
) -> None:
    pipeline, virtual, settings = case
    try:
        TransformerConfig(
            num_layers=32,
            hidden_size=64,
            num_attention_heads=4,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_dtype="float32",
            **settings,
        )
        refused = False
    except (ValueError, AssertionError):
        refused = True
    found = list(pipeline_stages(run_of(pipeline, virtual, settings), LLAMA_8B, False))
    assert bool(found) is refused, found


def test_what_megatron_finds_out_later_is_refused_too() -> None:
    """32 layers: a stage with fewer than none, three stages that no setting makes uneven, and a
    layout with more chunks than parallel.virtual_pipeline says, or longer than memory."""
    chunks = {LAYOUT: "E(tttttttt|)*3t*8L"}
    endless = {LAYOUT: "E(t*99999999999|)*99999999999t*" + "9" * 5000}
    for pipeline, settings in (
        *((2, {FIRST: 40}), (3, {LOSS: False}), (3, {FIRST: None})),
        *((2, chunks), (2, endless)),
    ):
        assert list(pipeline_stages(run_of(pipeline, None, settings), LLAMA_8B, False))


@pytest.mark.parametrize(
    ("shape", "pipeline", "settings", "stage"),
    [
        (LLAMA_8B, 4, {}, 0),
        (LLAMA_8B, 4, {FIRST: 5, LAST: 5, "recompute_granularity": "full"}, 1),
        (DEEPSEEK_671B, 16, {LAST: 1, "recompute_granularity": "full"}, 1),
    ],
)  # fmt: skip
def test_the_fullest_stage_may_be_between(
    shape: Any, pipeline: int, settings: dict[str, Any], stage: int
) -> None:
    """The first may have fewer layers, or layers without experts: by every stage's own bytes."""
    run = run_of(pipeline, None, settings)
    every = [rank_memory(shape, run, stage=number).total for number in range(pipeline)]
    assert fullest(shape, run)[0] == stage == every.index(max(every))
    assert fullest(shape, run)[1].total == max(every)


def test_few_stages_stand_for_all() -> None:
    assert unlike_stages(QWEN3_32B, run_of(8, None, {})) == [0, 1, 7]
    assert unlike_stages(DEEPSEEK_671B, run_of(16, None, {LAST: 1})) == [0, 1, 15]


def test_the_report_shows_the_fullest_stage() -> None:
    run = run_of(4, None, {FIRST: 5, LAST: 5, "recompute_granularity": "full"})
    text = report(LLAMA_8B, run, GPUS["h100-80gb"], None)
    head = next(line for line in text.splitlines() if line.startswith("GiB a rank"))
    assert head.split()[3:] == ["stage", "0", "stage", "1", "stage", "3"]
    assert text.endswith("fits: stage 1 needs the most\n")
