"""What `sfpo-megatron plan` prints. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from sfpo_megatron.config.rules.rows import MANY, at_most
from sfpo_megatron.config.training import batches_in
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.host.gpus import GPUS_PER_NODE
from sfpo_megatron.planner import hardware
from sfpo_megatron.planner.hardware import GIB, USABLE_MEMORY, Gpu
from sfpo_megatron.planner.layouts import fits, fullest, recommend
from sfpo_megatron.planner.memory import engine_memory, num_params, rank_memory
from sfpo_megatron.planner.nodes import (
    LayoutError,
    crossing_advice,
    idle_advice,
    job_layout,
    least_nodes,
)
from sfpo_megatron.planner.time import Workload, active_params, num_gpus, step_seconds

_FORMULAS = {
    "generation": "longest response x (weights / HBM + 5 ms) + keys and values + compute",
    "logprobs": "forwards, at a share of the peak",
    "passes": "K+1 passes: forward, backward, optimizer steps, their collectives",
    "reposition": "snapshot, lerp, gather",
    "refit": "3.6 s + weights / 13.6 GB/s",
    "handover": "colocated: params, main params, optimizer to the host and back at 25 GB/s",
}

_SHARED = ("asleep", "refit", "handover")
"""Rows of runs whose engines share the trainer's GPUs."""
_SELECTIVE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "mlp", "moe", "layernorm"],
}


def with_data(config: RunConfig, nodes: int | None) -> RunConfig:
    """`config` with `parallel.data` as a number: what a job of so many nodes would take, or, where
    none are given, what a node has left, one at least. Raises LayoutError as `job_layout`."""
    if config.parallel.data is not None:
        return config
    if nodes is None:
        ranks = GPUS_PER_NODE - config.num_engine_gpus
    else:
        ranks = job_layout(config, nodes=nodes, gpus_per_node=GPUS_PER_NODE).world_size
    data = max(ranks // config.parallel.model_size, 1)
    return replace(config, parallel=replace(config.parallel, data=data))


def _colocated(config: RunConfig) -> bool:
    return config.rollout.placement == "colocated"


def report(shape: ModelShape, config: RunConfig, gpu: Gpu, nodes: int | None) -> str:
    """The whole text: memory, seconds, and another layout where this one does not fit."""
    config = with_data(config, nodes)
    gpus, engines = num_gpus(config), config.num_engine_gpus
    faults, advice, together = list(_engine_faults(shape, config, gpu)), list[str | None](), ""
    try:
        least = least_nodes(config, gpus_per_node=GPUS_PER_NODE)
        together = f": {least} node{'s' * (least > 1)}"
        layout = job_layout(config, nodes=nodes or least, gpus_per_node=GPUS_PER_NODE)
        if nodes is not None:
            advice.append(idle_advice(config, nodes=nodes, gpus_per_node=GPUS_PER_NODE))
        advice.append(crossing_advice(config, layout))
    except LayoutError as error:
        faults.append(f"does not fit: {error}")
    roles = f"train, {engines} generate" if engines else "train"
    if _colocated(config):
        roles = "train and generate in turn"
    work = Workload.guessed(config)
    stage, memory = fullest(shape, config)
    lines = [
        f"{shape.family}: {num_params(shape) / 1e9:.2f}B params, {active_params(shape) / 1e9:.2f}B "
        "for a token",
        f"{gpus} {gpu.name} {roles}{together}",
        *_epochs(config),
        "",
        *_memory_table(shape, config, gpu, stage),
        "",
        *_seconds_table(shape, config, gpu, work),
        "",
    ]
    lines += [*faults, *_ranks_without_rollouts(config), *filter(None, advice)]
    if fits(memory, gpu):
        lines += [] if faults else [f"fits: stage {stage} needs the most"]
        return "\n".join(lines) + "\n"
    lines.append(
        f"does not fit: stage {stage} needs {memory.total / GIB:.1f} GiB of "
        f"{USABLE_MEMORY * gpu.memory_bytes / GIB:.1f}"
    )
    lines += _advice(shape, config, gpu, gpus, work)
    return "\n".join(lines) + "\n"


def _epochs(config: RunConfig) -> Iterator[str]:
    """What train.num_epochs comes to, by a count that reads no row."""
    num_epochs = config.train.num_epochs
    if num_epochs is None:
        return
    counts = [at_most(source, MANY) for source in config.data.train]
    if None in counts:
        yield f"{num_epochs} epochs: as many train steps as the rows come to"
        return
    rows = sum(count or 0 for count in counts)
    per_step = math.ceil(config.train.prompts_per_step * config.rollout.oversample)
    steps = batches_in(num_epochs, rows, per_step)
    yield f"{num_epochs} epochs of at most {rows:,} prompts: at most {steps:,} train steps"


def _engine_faults(shape: ModelShape, config: RunConfig, gpu: Gpu) -> Iterator[str]:
    """Why an engine does not fit: beside what the trainer has left behind, or at all."""
    if config.debug.train_only is not None:
        return
    share = config.rollout.gpu_memory_utilization
    most = (gpu.memory_bytes - hardware.AWAY_BYTES) / gpu.memory_bytes
    if _colocated(config) and share > most:
        yield (
            f"does not fit: rollout.gpu_memory_utilization {share:g} beside what the trainer keeps "
            f"({hardware.AWAY_BYTES / GIB:g} GiB): lower it to {int(100 * most) / 100:g}"
        )
    wider = "raise rollout.tensor_parallel"
    if config.rollout.tensor_parallel >= GPUS_PER_NODE:
        wider = "set rollout.quantization, or take a larger GPU"
    engine = engine_memory(shape, config, gpu.memory_bytes)
    room = share * gpu.memory_bytes
    if engine.weights > room:
        yield (
            f"does not fit: an engine's weights are {engine.weights / GIB:.1f} GiB a GPU, and "
            f"rollout.gpu_memory_utilization {share:g} leaves it {room / GIB:.1f}; {wider}"
        )
    elif engine.kv_tokens < config.engine_tokens:
        yield (
            "does not fit: an engine has no room for one rollout's keys and values; raise "
            f"rollout.gpu_memory_utilization, or {wider}"
        )


def _ranks_without_rollouts(config: RunConfig) -> Iterator[str]:
    """Ranks that whole rollouts do not reach."""
    data, rollouts = config.parallel.data or 1, config.train.rollouts_per_minibatch
    if data > rollouts:
        yield (
            f"{data - rollouts} of {data} data-parallel ranks would have no rollout of a minibatch "
            f"({rollouts}): lower parallel.data, or train.minibatches_per_step"
        )


def _advice(
    shape: ModelShape, config: RunConfig, gpu: Gpu, gpus: int, work: Workload
) -> Iterator[str]:
    for factor in (1, 2, 4, 8, 16):
        option = recommend(shape, config, gpu, factor * gpus, work)
        if option is not None:
            where = f"on {factor * gpus} GPUs" if factor > 1 else "on as many GPUs"
            yield f"{where}, {option.memory.total / GIB:.1f} GiB: {' '.join(option.overrides())}"
            return
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.train.microbatch_size is None and config.train.max_tokens_per_microbatch < longest:
        yield (
            "no layout is advised: without context parallelism a microbatch has no room for one "
            f"rollout; raise train.max_tokens_per_microbatch to {longest}, or parallel.context"
        )
        return
    yield f"no layout fits on {16 * gpus} GPUs: offload the optimizer or shorten microbatches"


def _memory_table(
    shape: ModelShape, config: RunConfig, gpu: Gpu, fullest_stage: int
) -> Iterator[str]:
    """GiB of a rank of the first, of the fullest and of the last stage."""
    stages = sorted({0, fullest_stage, config.parallel.pipeline - 1})
    columns = [rank_memory(shape, config, stage=stage) for stage in stages]
    yield from _aligned(
        [
            ("GiB a rank", *(f"stage {stage}" for stage in stages)),
            *(
                (f.name.replace("_", " "), *(f"{getattr(c, f.name) / GIB:.2f}" for c in columns))
                for f in fields(columns[0])
                if f.name != "host" and (f.name not in _SHARED or _colocated(config))
            ),
            ("total", *(f"{c.total / GIB:.2f}" for c in columns)),
            ("host, page-locked", *(f"{c.host / GIB:.2f}" for c in columns)),
            ("  of a node", *(f"{GPUS_PER_NODE * c.host / GIB:.2f}" for c in columns)),
        ]
    )
    yield ""
    yield "activations by recompute:"
    for name, settings in (
        ("none", {}),
        ("selective, MLP and norms", _SELECTIVE),
        ("full, uniform, 1 layer", {"recompute_granularity": "full"}),
    ):
        kept = {
            k: v for k, v in config.megatron.transformer.items() if not k.startswith("recompute_")
        }
        megatron = replace(config.megatron, transformer=kept | settings)
        other = replace(config, megatron=megatron)
        amounts = [rank_memory(shape, other, stage=stage).activations for stage in stages]
        yield f"  {name:26}" + "".join(f"{amount / GIB:10.2f}" for amount in amounts)
    engine = engine_memory(shape, config, gpu.memory_bytes)
    yield ""
    yield (
        f"engine, a GPU: weights {engine.weights / GIB:.2f} GiB, keys and values "
        f"{engine.kv_cache / GIB:.2f} GiB: {engine.kv_tokens:,} tokens"
    )


def _seconds_table(shape: ModelShape, config: RunConfig, gpu: Gpu, work: Workload) -> Iterator[str]:
    seconds = step_seconds(shape, config, gpu, work)
    overlap = "generation beside the rest (rollout.async_steps)" if seconds.overlapped else ""
    rows = [
        (name, f"{getattr(seconds, name):.1f}", text)
        for name, text in _FORMULAS.items()
        if name not in _SHARED or _colocated(config)
    ]
    yield from _aligned(
        [("seconds a step", "", "from"), *rows, ("total", f"{seconds.total:.1f}", overlap)]
    )
    yield (
        f"assumed: prompts of {work.mean_prompt:.0f} tokens, responses of "
        f"{work.mean_response:.0f}, the longest {work.longest_response:.0f}; "
        f"{100 * (gpu.moe_mfu if shape.moe else hardware.DENSE_MFU):.0f}% of the peak in training"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i != 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
