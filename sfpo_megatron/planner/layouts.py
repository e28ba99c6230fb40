"""Layouts of a model on some GPUs: which fit, and which of those is the quickest. No torch."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from sfpo_megatron.config.check import layout_problems
from sfpo_megatron.config.overrides import override_of
from sfpo_megatron.config.tree import MegatronConfig, RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.host.gpus import GPUS_PER_NODE
from sfpo_megatron.planner.hardware import USABLE_MEMORY, Gpu
from sfpo_megatron.planner.memory import DTYPE_BYTES, RankMemory, num_params, rank_memory
from sfpo_megatron.planner.params import unlike_stages
from sfpo_megatron.planner.time import StepSeconds, Workload, step_seconds

_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_ALWAYS_SAID = ("data", "tensor", "pipeline", "expert", "sequence")
_DIVIDED_BY_HAND = ("pipeline_stage", "pipeline_split", "pipeline_model_parallel_layout")
"""Parts of names of settings that say which stage has which layers."""
_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(kw_only=True, frozen=True, slots=True)
class Option:
    """A layout that fits."""

    given: RunConfig
    """The config that it was found for."""
    config: RunConfig
    memory: RankMemory
    seconds: StepSeconds

    def overrides(self) -> list[str]:
        """What to write on the command line after what has made `given`."""
        parallel, before = asdict(self.config.parallel), asdict(self.given.parallel)
        found = {
            f"parallel.{name}": value
            for name, value in parallel.items()
            if name in _ALWAYS_SAID or value != before[name]
        }
        if self.config.rollout.placement == "colocated":
            found["rollout.num_engines"] = self.config.rollout.num_engines
        section = "megatron.transformer"
        then, now = self.given.megatron.transformer, self.config.megatron.transformer
        if then.keys() - now.keys():  # an override can replace a section, and take nothing out
            found[section] = now
        else:
            found |= {f"{section}.{k}": v for k, v in now.items() if v != then.get(k)}
        return [shlex.quote(override_of(key, value)) for key, value in found.items()]


def fullest(shape: ModelShape, config: RunConfig) -> tuple[int, RankMemory]:
    """(stage, memory) of the rank that needs the most."""
    return max(
        (
            (stage, rank_memory(shape, config, stage=stage))
            for stage in unlike_stages(shape, config)
        ),
        key=lambda pair: pair[1].total,
    )


def fits(memory: RankMemory, gpu: Gpu) -> bool:
    return memory.total <= USABLE_MEMORY * gpu.memory_bytes


def recommend(
    shape: ModelShape, config: RunConfig, gpu: Gpu, gpus: int, work: Workload
) -> Option | None:
    """The quickest layout of the trainer on `gpus` GPUs that fits; None if none does."""
    found = []
    known = list(layout_problems(config, shape))  # of its lengths, not of its layout
    least = num_params(shape) * DTYPE_BYTES[config.model.dtype]
    for candidate in _candidates(shape, config, gpus):
        parallel = candidate.parallel
        if least > gpu.memory_bytes * parallel.model_size * parallel.expert:
            continue
        new = (problem for problem in layout_problems(candidate, shape) if problem not in known)
        if any(problem.level == "error" for problem in new):
            continue
        _, memory = fullest(shape, candidate)
        if fits(memory, gpu):
            seconds = step_seconds(shape, candidate, gpu, work)
            found.append(Option(given=config, config=candidate, memory=memory, seconds=seconds))
    return min(found, key=lambda option: option.seconds.total, default=None)


def _stages(layers: int, pipeline: int) -> dict[str, int] | None:
    """Megatron's setting that gives the last stage what is left; None where nothing is."""
    if layers % pipeline == 0:
        return {}
    last = layers - (pipeline - 1) * -(-layers // pipeline)
    return {"num_layers_in_last_pipeline_stage": last} if last > 0 else None


def _candidates(shape: ModelShape, config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    plain = {k: v for k, v in config.megatron.transformer.items() if not k.startswith("recompute_")}
    plain = {k: v for k, v in plain.items() if not any(part in k for part in _DIVIDED_BY_HAND)}
    experts = shape.moe.num_experts if shape.moe else 1
    rollout = config.rollout
    if rollout.placement == "colocated":  # on all of the trainer's GPUs
        rollout = replace(rollout, num_engines=max(gpus // rollout.tensor_parallel, 1))
    for tensor, pipeline, expert in itertools.product(_POWERS, _POWERS, _POWERS):
        if tensor > GPUS_PER_NODE or gpus % (tensor * pipeline):
            continue
        data = gpus // (tensor * pipeline)
        groups = shape.num_kv_heads
        if shape.num_heads % tensor or (groups % tensor and tensor % groups):
            continue
        stages = _stages(shape.num_layers, pipeline)
        if stages is None or shape.ffn_size % tensor:
            continue
        if experts % expert or (data * tensor) % expert:
            continue
        if expert == 1 and tensor > 1 and shape.moe:
            continue  # config/rules/experts.py: its gradients would miss tokens
        if config.train.rollouts_per_minibatch < data:
            continue
        parallel = replace(
            config.parallel,
            data=data,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=None,
            expert=expert,
            expert_tensor=1,
            context=1,
            sequence=tensor > 1,
        )
        for transformer in (plain | stages, plain | stages | _RECOMPUTE):
            megatron = MegatronConfig(
                transformer=transformer,
                ddp=config.megatron.ddp,
                optimizer=config.megatron.optimizer,
            )
            yield replace(config, parallel=parallel, megatron=megatron, rollout=rollout)
