"""What `plan` says of engines that have no room, and of ranks that have nothing to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.config.tree import DebugConfig, ParallelConfig, RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.memory import engine_memory, num_params
from sfpo_megatron.planner.models import DEEPSEEK_671B, LLAMA_70B, QWEN2_5_1_5B
from sfpo_megatron.planner.report import report
from sfpo_megatron.planner.scaling import base_config
from sfpo_megatron.planner.time import Workload, decoder, step_seconds

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100-80gb"]
LAYOUT = {"data": 4, "tensor": 8, "sequence": True, "pipeline": 4}
WEIGHTS = "does not fit: an engine's weights are 131.4 GiB a GPU"
NO_ROOM = "does not fit: an engine has no room for one rollout's keys and values"


def config(*, debug: DebugConfig | None = None, **rollout: Any) -> RunConfig:
    base = base_config()
    return dataclasses.replace(
        base,
        parallel=ParallelConfig(**LAYOUT),
        rollout=dataclasses.replace(base.rollout, **rollout),
        debug=debug or base.debug,
    )


@pytest.mark.parametrize("placement", ["dedicated", "colocated"])
@pytest.mark.parametrize(
    ("tensor", "share", "found"), [(1, 0.9, WEIGHTS), (2, 0.832, NO_ROOM), (8, 0.9, "")]
)
def test_an_engine_has_room_for_its_weights_and_a_rollout(
    placement: str, tensor: int, share: float, found: str
) -> None:
    num_engines = 128 // tensor if placement == "colocated" else 4
    given = {"placement": placement, "tensor_parallel": tensor, "num_engines": num_engines}
    run = config(**given, gpu_memory_utilization=share)
    text = report(LLAMA_70B, run, H100, None)
    faults = [line for line in text.splitlines() if line.startswith("does not fit: an engine")]
    assert [fault.startswith(found) for fault in faults] == [True] * bool(found)
    assert ("\nfits: " in text) is not bool(found)
    # A run on saved rollouts starts no engine.
    saved = config(**given, gpu_memory_utilization=share, debug=DebugConfig(train_only="x"))
    assert "an engine" not in report(LLAMA_70B, saved, H100, None)


def test_the_ends_of_a_quantized_engine_are_not_quantized() -> None:
    """DeepSeek-V3: 671.03B weights, 129,280 x 7168 of them in the embedding and in the head each.
    Tied, Qwen2.5 1.5B has its 151,936 x 1536 once."""
    for shape, tensor, weights, ends in (
        (DEEPSEEK_671B, 8, 671_026_404_352, 2 * 129_280 * 7168),
        (QWEN2_5_1_5B, 1, 1_543_714_304, 151_936 * 1536),
    ):
        assert num_params(shape) == weights
        run = config(tensor_parallel=tensor, quantization="fp8_per_channel")
        quantized = engine_memory(shape, run, H100.memory_bytes).weights
        assert quantized == (weights + ends) // tensor
        whole = engine_memory(shape, config(tensor_parallel=tensor), H100.memory_bytes).weights
        assert whole == 2 * weights // tensor


def test_an_engine_stays_on_one_node() -> None:
    wide = "does not fit: rollout.tensor_parallel: found 16, expected at most the 8 GPUs of a node"
    small: Any = {"placement": "dedicated", "num_engines": 1, "gpu_memory_utilization": 0.1}
    for tensor, advice in (
        (16, "set rollout.quantization, or take a larger GPU"),
        (8, "set rollout.quantization, or take a larger GPU"),
        (4, "raise rollout.tensor_parallel"),
    ):
        text = report(LLAMA_70B, config(**small, tensor_parallel=tensor), H100, None)
        assert (wide in text) is (tensor == 16)
        faults = [line for line in text.splitlines() if "an engine's weights are" in line]
        assert [line.endswith(advice) for line in faults] == [True], tensor
    for nodes in (None, 32):
        alone = config(placement="dedicated", num_engines=1, tensor_parallel=16)
        text = report(LLAMA_70B, alone, H100, nodes)
        assert wide in text and "\nfits: " not in text


def test_ranks_beyond_the_rollouts_make_nothing_quicker() -> None:
    def of(data: int) -> RunConfig:
        base = base_config()
        train = dataclasses.replace(base.train, prompts_per_step=32, group_size=4)
        parallel = ParallelConfig(data=data)
        return dataclasses.replace(base, train=train, parallel=parallel)

    assert of(1).train.rollouts_per_minibatch == 32
    work = Workload.guessed(of(1))
    seconds = [step_seconds(QWEN2_5_1_5B, of(data), H100, work) for data in (16, 32, 512)]
    assert seconds[0].logprobs == pytest.approx(2 * seconds[1].logprobs)
    assert seconds[1].logprobs == seconds[2].logprobs
    assert seconds[2].passes > 0.9 * seconds[1].passes
    assert "data-parallel ranks" not in report(QWEN2_5_1_5B, of(32), H100, None)
    assert (
        "\n480 of 512 data-parallel ranks would have no rollout of a minibatch (32): lower "
        "parallel.data, or train.minibatches_per_step\n"
    ) in report(QWEN2_5_1_5B, of(512), H100, None)


@pytest.mark.parametrize("shape", [QWEN2_5_1_5B, LLAMA_70B], ids=["tied", "untied"])
def test_a_decoding_step_reads_one_row_of_an_embedding(shape: ModelShape) -> None:
    """All of a head, whether it is the embedding too or not."""
    run = config(tensor_parallel=8)
    tied, untied = (
        decoder(dataclasses.replace(shape, tied_embeddings=is_tied), run, H100).dense_s
        for is_tied in (True, False)
    )
    assert tied == pytest.approx(untied, rel=1e-12)


@pytest.mark.parametrize(
    ("parallel", "crosses"),
    [
        ({"tensor": 8, "data": 4}, False),
        ({"tensor": 16, "data": 1}, True),
        ({"tensor": 3, "data": 4}, False),  # two nodes of six ranks
        ({"tensor": 6, "data": 4}, True),  # three nodes of eight
        ({"tensor": 6, "data": 1}, False),
    ],
)
def test_layers_wait_for_the_network_where_groups_lie_across_nodes(
    parallel: dict[str, int], crosses: bool
) -> None:
    run = dataclasses.replace(base_config(), parallel=ParallelConfig(**parallel))
    work = Workload.guessed(run)
    slow = dataclasses.replace(H100, network_bytes_per_s=1e9)
    usual, slower = (step_seconds(QWEN2_5_1_5B, run, gpu, work).logprobs for gpu in (H100, slow))
    assert (slower > 2 * usual) if crosses else slower == usual
