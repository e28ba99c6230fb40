"""Ranks and engines over nodes: what `plan` says and what `slurm` writes into a job is the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.cli import main
from sfpo_megatron.config.tree import DebugConfig, ParallelConfig, RunConfig
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.models import QWEN2_5_1_5B
from sfpo_megatron.planner.nodes import (
    JobLayout,
    LayoutError,
    crossing_advice,
    idle_advice,
    job_layout,
    least_nodes,
)
from sfpo_megatron.planner.report import report, with_data
from sfpo_megatron.planner.scaling import base_config

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100-80gb"]


def run_of(parallel: dict[str, Any], rollout: dict[str, Any]) -> RunConfig:
    base = base_config()
    engines = dataclasses.replace(base.rollout, **rollout)
    return dataclasses.replace(base, parallel=ParallelConfig(**parallel), rollout=engines)


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int | None, tuple[int, int]]] = {
    # parallel, rollout, nodes, --train-nodes -> training nodes, ranks on each
    "one node, the rest generates": ({"data": None}, {"num_engines": 4}, 1, None, (1, 4)),
    "one node, all given": ({"data": 2, "tensor": 2}, {"num_engines": 2}, 1, None, (1, 4)),
    "engine nodes of their own": ({"data": None}, {"num_engines": 9}, 4, None, (2, 8)),
    "tp 4 engines": ({"data": None}, {"num_engines": 4, "tensor_parallel": 4}, 4, None, (2, 8)),
    "as few nodes as the ranks need": ({"data": 12}, {}, 4, None, (2, 6)),
    "the same number of ranks on each": ({"data": 9}, {"num_engines": 7}, 4, None, (3, 3)),
    "colocated": ({"data": None}, {"placement": "colocated"}, 4, None, (4, 8)),
    "colocated, all given": ({"data": 16}, {"placement": "colocated"}, 4, None, (4, 4)),
    "colocated, engines of four": (
        {"data": 8, "tensor": 2},
        {"placement": "colocated", "tensor_parallel": 4},
        4,
        None,
        (4, 4),
    ),
    "spread": ({"data": 4}, {}, 4, 4, (4, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    parallel, rollout, nodes, train_nodes, expected = LAYOUTS[name]
    loaded = run_of(parallel, rollout)
    layout = job_layout(loaded, nodes=nodes, gpus_per_node=8, train_nodes=train_nodes)
    assert layout == JobLayout(train_nodes=expected[0], ranks_per_node=expected[1])


def test_layouts_of_any_size_are_found_at_once() -> None:
    """A prime number of ranks, one on each node; a job with more nodes than it needs."""
    prime = run_of({"data": 2**31 - 1}, {})
    assert least_nodes(prime, gpus_per_node=8) == 2**31 - 1
    said = idle_advice(run_of({"data": 9}, {}), nodes=10**9, gpus_per_node=8)
    assert "or ask for 3 nodes, or" in str(said)


def test_no_advice_is_to_have_no_engine() -> None:
    """An engine needs all GPUs of a node, and a rank is on it."""
    run = run_of({"data": 1}, {"placement": "colocated", "tensor_parallel": 4})
    said = idle_advice(run, nodes=1, gpus_per_node=4)
    assert said is not None and said.endswith(
        "null, which takes what is left, and rollout.num_engines to 1"
    )


def test_idle_gpus_are_counted() -> None:
    """Four nodes of 8: all train in turn with engines, or 12 train and one generates."""
    for parallel, rollout, idle, engines in (
        ({"data": None}, {"placement": "colocated"}, 0, None),
        ({"data": 12}, {}, 19, None),
        ({"data": 16}, {"placement": "colocated"}, 16, 32),
        ({"data": 8}, {"placement": "colocated", "tensor_parallel": 2}, 24, 16),
    ):
        loaded = run_of(parallel, rollout)
        said = idle_advice(loaded, nodes=4, gpus_per_node=8)
        assert said is None if not idle else f"{idle} of the 32 GPUs" in str(said)
        assert (f"rollout.num_engines to {engines}, or" in str(said)) == (engines is not None)


@pytest.mark.parametrize(
    ("parallel", "rollout", "train_nodes", "message"),
    [
        ({"data": 32}, {}, None, "found 2, expected at least the 4 that 32 ranks take"),
        ({"data": 16}, {}, None, "found 2 nodes of 8 GPUs, expected 3: 16 GPUs train, 1 generate"),
        ({"data": 3}, {}, 2, "found 3 ranks on 2 training nodes, expected the same number on each"),
        ({"data": None}, {}, 3, "--train-nodes: found 3, expected at most the 2 of --nodes"),
        ({"data": 12}, {}, 1, "found 12 ranks on 1 training nodes, expected the same number"),
        (
            {"data": None, "tensor": 3},
            {},
            None,
            "found 8 GPUs for the trainer, expected a multiple",
        ),
        (
            {"data": None},
            {"num_engines": 99},
            None,
            "--nodes: found 2, expected at least the 13 that 99 engines",
        ),
        ({"data": None}, {"num_engines": 16}, None, "parallel: found 0 GPUs for the trainer"),
        # Two of the sixteen GPUs are left on each node: no engine of four has a place.
        ({"data": 12}, {"tensor_parallel": 4}, None, "expected 3: 12 GPUs train, 4 generate"),
        ({}, {"tensor_parallel": 16}, None, "rollout.tensor_parallel: found 16, expected at most"),
        # The second of three engines would share memory with two ranks of each node.
        (
            {"data": 6, "tensor": 2},
            {"placement": "colocated", "tensor_parallel": 4, "num_engines": 3},
            None,
            "rollout.tensor_parallel: found 4 with rollout.placement: colocated and 6 ranks on "
            "each of 2 nodes, expected a divisor of 6",
        ),
    ],
)
def test_layouts_that_do_not_fit(
    parallel: dict[str, Any],
    rollout: dict[str, Any],
    train_nodes: int | None,
    message: str,
) -> None:
    loaded = run_of(parallel, rollout)
    with pytest.raises(LayoutError, match=re.escape(message)):
        job_layout(loaded, nodes=2, gpus_per_node=8, train_nodes=train_nodes)


def test_one_node_has_no_second_to_train_on() -> None:
    with pytest.raises(LayoutError, match="--train-nodes: found 2, expected at most the 1 of"):
        job_layout(run_of({"data": None}, {}), nodes=1, gpus_per_node=8, train_nodes=2)


BIG = {"tensor": 8, "pipeline": 2, "sequence": True}
ENGINES = {"num_engines": 3, "tensor_parallel": 4}
NULL = "set parallel.data to null, which takes what is left"


@pytest.mark.parametrize(
    ("parallel", "rollout", "nodes", "train_nodes", "advice"),
    [
        # All is taken but what one more engine would fill; on three nodes no 16 ranks are left.
        ({"data": None, **BIG}, ENGINES, 4, None, "raise rollout.num_engines to 4"),
        # What five nodes leave is no multiple of 16.
        (
            {"data": 1, **BIG},
            ENGINES,
            5,
            None,
            "ask for 4 nodes, or raise rollout.num_engines to 6",
        ),
        (
            {"data": 3},
            {"num_engines": 2},
            1,
            None,
            f"{NULL}, or raise rollout.num_engines to 5",
        ),
        # Sixteen ranks are not on three nodes as many on each, on two they are.
        (
            {"data": 16},
            {"placement": "colocated"},
            4,
            None,
            f"{NULL}, and rollout.num_engines to 32, or ask for 2 nodes",
        ),
        ({"data": None}, {}, 3, 1, "ask for 2 nodes, or raise rollout.num_engines to 16"),
        (
            {"data": None},
            {"num_engines": 2, "tensor_parallel": 3},
            2,
            None,
            "set parallel or rollout.tensor_parallel to sizes that fill a node",
        ),
    ],
)
def test_advice_on_idle_gpus(
    parallel: dict[str, Any],
    rollout: dict[str, Any],
    nodes: int,
    train_nodes: int | None,
    advice: str,
) -> None:
    said = idle_advice(
        run_of(parallel, rollout), nodes=nodes, gpus_per_node=8, train_nodes=train_nodes
    )
    assert str(said).partition("would stay idle; ")[2] == advice


@pytest.mark.parametrize(
    ("parallel", "gpus_per_node", "advice"),
    [
        ({"tensor": 8, "data": 1}, 8, None),
        ({"tensor": 2, "pipeline": 4, "data": 2}, 8, None),
        ({"tensor": 8, "data": 2}, 4, "parallel.tensor 8 lie across nodes of 4 ranks"),
        ({"tensor": 16, "data": 1}, 8, "one that divides 8, and a larger parallel.pipeline"),
        ({"tensor": 6, "data": 4}, 8, "parallel.tensor 6 lie across nodes of 8 ranks"),
        ({"tensor": 6, "data": 1}, 8, None),
    ],
)
def test_advice_on_groups_across_nodes(
    parallel: dict[str, Any], gpus_per_node: int, advice: str | None
) -> None:
    run = run_of(parallel, {})
    nodes = least_nodes(run, gpus_per_node=gpus_per_node)
    layout = job_layout(run, nodes=nodes, gpus_per_node=gpus_per_node)
    said = crossing_advice(run, layout)
    assert said is None if advice is None else advice in str(said)
    if gpus_per_node == 8:
        assert ("lie across nodes" in report(QWEN2_5_1_5B, run, H100, None)) == (said is not None)


@pytest.mark.parametrize("placement", ["dedicated", "colocated"])
def test_the_least_nodes_are_those_of_a_job(placement: str) -> None:
    """Whatever the ranks' number; `plan` says that they fit."""
    for data, engines in ((9, 7), (9, 9), (12, 4), (11, 1), (1, 20), (7, 1)):
        run = run_of({"data": data}, {"placement": placement, "num_engines": engines})
        least = least_nodes(run, gpus_per_node=8)
        assert job_layout(run, nodes=least, gpus_per_node=8).world_size == data
        for nodes in range(1, least):
            with pytest.raises(LayoutError):
                job_layout(run, nodes=nodes, gpus_per_node=8)
        nodes = "1 node" if least == 1 else f"{least} nodes"
        assert f": {nodes}\n" in report(QWEN2_5_1_5B, run, H100, None)
    for engines, expected in ((7, 3), (9, 3)):
        run = run_of({"data": 9}, {"placement": placement, "num_engines": engines})
        assert least_nodes(run, gpus_per_node=8) == expected


@pytest.mark.parametrize(
    ("parallel", "rollout", "nodes", "said"),
    [
        # Engines that fill part of a node leave the rest of it idle: 24 ranks, not 26.
        ({"data": None}, {"num_engines": 6}, 4, "24 h100-80gb train, 6 generate: 4 nodes\n"),
        ({"data": None}, {"num_engines": 6}, 4, "2 of the 32 GPUs would stay idle; raise"),
        # Six ranks of each node leave an engine of four no place on either.
        ({"data": 12}, {"tensor_parallel": 4}, None, "12 h100-80gb train, 4 generate: 3 nodes\n"),
        ({"data": 12}, {"tensor_parallel": 4}, 2, "does not fit: --nodes: found 2 nodes of 8 GPUs"),
        ({"data": 16}, {"tensor_parallel": 5, "num_engines": 8}, None, "40 generate: 10 nodes\n"),
    ],
)
def test_nodes_are_those_of_the_job(
    parallel: dict[str, Any], rollout: dict[str, Any], nodes: int | None, said: str
) -> None:
    """Ranks and nodes are those that `slurm` would write into the job."""
    run = run_of(parallel, rollout)
    assert said in report(QWEN2_5_1_5B, run, H100, nodes)
    if nodes is not None and "does not fit" not in said:
        layout = job_layout(run, nodes=nodes, gpus_per_node=8)
        assert layout.world_size == with_data(run, nodes).parallel.data


def test_what_no_job_takes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    file = "examples/qwen2.5-math-7b/config.yaml"
    layout = ["parallel={data: null, tensor: 8, pipeline: 2, sequence: true}"]
    command = ["plan", str(ROOT / file), f"model.path={(ROOT / file).parent / 'model'}", *layout]
    assert main([*command, "--nodes", "3", "rollout.num_engines=24"]) == 2
    assert capsys.readouterr().err == (
        "error: parallel: found 24 GPUs for the trainer, expected a multiple of 16 (tensor x "
        "pipeline x context); change --nodes, the layout, or the engines' number\n"
    )


def test_a_run_on_saved_rollouts_has_all_nodes() -> None:
    shared = run_of({"data": 6, "tensor": 2}, {"placement": "colocated", "tensor_parallel": 4})
    shared = dataclasses.replace(shared, debug=DebugConfig(train_only="x"))
    assert job_layout(shared, nodes=2, gpus_per_node=8).ranks_per_node == 6
    run = run_of({"data": None}, {"num_engines": 8})
    run = dataclasses.replace(run, debug=DebugConfig(train_only="x"))
    assert with_data(run, 2).parallel.data == 16
    assert "16 h100-80gb train: 2 nodes\n" in report(QWEN2_5_1_5B, run, H100, 2)
