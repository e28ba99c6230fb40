"""What one section cannot know: checks across sections, against the world size and the files.

Torch-free, so that a login node refuses an impossible run before it is queued. Each rule is one
function that yields `Problem`s; `check_config` raises the first error and returns the warnings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules.agent import agent
from sfpo_megatron.config.rules.context_parallel import auxiliary_losses, context_parallel
from sfpo_megatron.config.rules.devices import engine_devices
from sfpo_megatron.config.rules.engine_reading import engine_reading
from sfpo_megatron.config.rules.engines import colocated, engines
from sfpo_megatron.config.rules.environment import environment
from sfpo_megatron.config.rules.experts import expert_layout, experts_of_model
from sfpo_megatron.config.rules.files import checkpoints, data, outputs
from sfpo_megatron.config.rules.gate import gate
from sfpo_megatron.config.rules.gpu_settings import gpu_settings
from sfpo_megatron.config.rules.length import length
from sfpo_megatron.config.rules.low_precision import low_precision
from sfpo_megatron.config.rules.machine import machine
from sfpo_megatron.config.rules.megatron_demands import megatron_demands
from sfpo_megatron.config.rules.model import MODEL_RULES, Problem, read_model
from sfpo_megatron.config.rules.old_logprobs import old_logprobs
from sfpo_megatron.config.rules.one_model import fused_rope, one_model
from sfpo_megatron.config.rules.optimizer_modes import optimizer_modes
from sfpo_megatron.config.rules.optimizer_settings import (
    data_parallel_settings,
    learning_rates,
    optimizer_settings,
)
from sfpo_megatron.config.rules.passed_through import (
    engine_arguments,
    engine_arguments_on,
    passed_through,
)
from sfpo_megatron.config.rules.plugins import own_code
from sfpo_megatron.config.rules.recompute import recompute
from sfpo_megatron.config.rules.rewards import server
from sfpo_megatron.config.rules.rows import rows
from sfpo_megatron.config.rules.saved_rollouts import (
    read_rollouts,
    rollout_tokens,
    saved_rollouts,
)
from sfpo_megatron.config.rules.tokenizer import tokenizer_fits
from sfpo_megatron.config.rules.tracking import sink_libraries
from sfpo_megatron.config.rules.transports import transport_of_device, transports
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.host.gpus import VISIBLE, driver, visible_devices


@dataclass(kw_only=True, frozen=True, slots=True)
class ConfigWarning:
    """Something that will not stop the run, or not yet."""

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"warning: {self.file}: {self.key}: {self.message}"


def has_cuda() -> bool:
    """True where the NVIDIA driver is loaded and its devices are not hidden; without torch."""
    hidden = VISIBLE in os.environ and not visible_devices()
    return driver() is not None and not hidden


def check_config(
    config: RunConfig,
    *,
    file: str,
    world_size: int | None = None,
    for_training: bool = False,
    on_cpu: bool | None = None,
    fills_batches: bool | None = None,
    only_reads: bool = False,
) -> list[ConfigWarning]:
    """Raise ConfigError on the first thing that cannot work; return what deserves a warning.

    `world_size`: ranks that are running, None when this process will start them itself.
    `for_training`: the run starts now, so that missing weights are an error, not a warning.
    `fills_batches`: it makes whole batches of rollouts, as neither `sft` nor `eval` does; None: if
    it is for training and not `only_reads`.
    `only_reads`: RUN/hf will not be written, so that what is there is no matter.
    `on_cpu`: what the other machines are where it will run; None for this one, on which what it
    lacks is an error where the run starts now.
    """
    is_here = on_cpu is None
    if fills_batches is None:
        fills_batches = for_training and not only_reads
    is_warm_start = for_training and not (fills_batches or only_reads)
    warnings = []
    rules = [_problems(config, world_size, not has_cuda() if on_cpu is None else on_cpu)]
    if is_here:
        rules.append(machine(config))
    for problem in chain(*rules):
        if problem.level == "error_when_writing" and only_reads:
            continue
        if problem.level == "error_when_rewarding" and is_warm_start:
            continue
        if (
            problem.level in ("error", "error_when_writing", "error_when_rewarding")
            or (problem.level == "error_when_training" and for_training)
            or (problem.level == "error_here" and for_training and is_here)
            or (problem.level == "error_when_filling" and fills_batches)
        ):
            raise ConfigError(
                file, problem.key, found=problem.found, expected=problem.expected, fix=problem.fix
            ) from problem.cause
        warnings.append(ConfigWarning(file=file, key=problem.key, message=problem.message))
    return warnings


def _problems(config: RunConfig, world_size: int | None, on_cpu: bool) -> Iterator[Problem]:
    """Cheapest first: layout, then batch, then what is read from files."""
    yield from _layout(config)
    yield from _world_size(config, world_size)
    yield from _idle_ranks(config, world_size)
    yield from expert_layout(config, world_size)
    yield from colocated(config, world_size)
    yield from engine_devices(config, world_size, on_cpu)
    yield from gpu_settings(config, on_cpu)
    yield from low_precision(config, on_cpu)
    for rule in _RULES:
        yield from rule(config)
    yield from megatron_demands(config, on_cpu)
    for item in read_model(config):
        if isinstance(item, Problem):
            yield item
            continue
        for model_rule in _OF_MODEL:
            yield from model_rule(config, item, on_cpu)


def layout_problems(config: RunConfig, shape: ModelShape) -> Iterator[Problem]:
    """What another layout of a config that is fine runs into, on GPUs; no file is read."""
    yield from _layout(config)
    yield from expert_layout(config, None)
    yield from colocated(config, None)
    for rule in (_batch, context_parallel, transports):
        yield from rule(config)
    for model_rule in (*MODEL_RULES, auxiliary_losses, experts_of_model):
        yield from model_rule(config, shape, False)


def _layout(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline",
            str(parallel.virtual_pipeline),
            "null when parallel.pipeline is 1",
            "set it to null, or parallel.pipeline to 2 or more",
        )


def _world_size(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    shape = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if world_size is None:
        if parallel.data is None:
            yield Problem(
                "parallel.data",
                "null with no ranks running",
                "a number",
                "set parallel.data, or start the ranks with torchrun",
                "error_when_training",
            )
        elif not has_cuda() and parallel.data * parallel.model_size > (os.cpu_count() or 1):
            yield Problem(
                "parallel",
                f"{parallel.data * parallel.model_size} ranks",
                f"at most one a core ({os.cpu_count()})",
                "fewer ranks run faster here",
                "warning",
            )
    elif parallel.data is None:
        if world_size % parallel.model_size:
            yield Problem(
                "parallel",
                f"{world_size} ranks",
                f"a multiple of {parallel.model_size} ({shape})",
                "start another number of ranks or change the layout",
            )
    elif parallel.data * parallel.model_size != world_size:
        yield Problem(
            "parallel",
            f"{world_size} ranks",
            f"{parallel.data * parallel.model_size} (data {parallel.data} x {shape})",
            "start that many ranks, or set parallel.data to null to take what there is",
        )


def _batch(config: RunConfig) -> Iterator[Problem]:
    train, context = config.train, config.parallel.context
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    room = train.max_tokens_per_microbatch * context
    if train.microbatch_size is None and room < longest:
        yield Problem(
            "train.max_tokens_per_microbatch",
            str(train.max_tokens_per_microbatch),
            f"at least one whole rollout ({longest} tokens: max_prompt_tokens + "
            "max_response_tokens"
            + (f", over {context} context-parallel ranks)" if context > 1 else ")"),
            f"set it to {-(-longest // context)} or more",
        )


def _idle_ranks(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Whole rollouts are dealt to data-parallel ranks, minibatch by minibatch."""
    data = config.parallel.data or (world_size or 0) // config.parallel.model_size
    rollouts = config.train.rollouts_per_minibatch
    if data > rollouts:
        yield Problem(
            "parallel.data",
            f"{data} with {rollouts} rollouts in a minibatch",
            f"at most {rollouts}: further ranks would have none",
            "lower it, or train.minibatches_per_step",
            "warning",
        )


def _algorithm(config: RunConfig) -> Iterator[Problem]:
    if config.sfpo.num_fast_passes > 0 and config.sfpo.alpha == 0:
        yield Problem(
            "sfpo.alpha",
            "0 with fast passes",
            "a number above 0",
            "alpha 0 throws the fast passes away; use sfpo.num_fast_passes=0 for plain GRPO",
            "warning",
        )
    predicts = config.sfpo.trajectory == "predicted" and config.sfpo.num_fast_passes > 0
    if predicts and config.sfpo.moments != "restore":
        yield Problem(
            "sfpo.moments",
            f"{config.sfpo.moments} with trajectory: predicted",
            "restore, as PrePO has it",
            "set sfpo.moments=restore; its authors compare with keep",
            "warning",
        )
    if config.rollout.top_p < 1 and not config.objective.importance_sampling.is_on:
        yield Problem(
            "rollout.top_p",
            f"{config.rollout.top_p:g}",
            "1",
            "the trainer's log-probs are of the whole distribution, so logprob_diff_* will contain "
            "the engine's renormalization",
            "warning",
        )


def _objective(config: RunConfig) -> Iterator[Problem]:
    buffer, limit = config.objective.overlong.buffer_tokens, config.rollout.max_response_tokens
    if buffer > limit:
        yield Problem(
            "objective.overlong.buffer_tokens",
            str(buffer),
            f"at most rollout.max_response_tokens ({limit})",
            "shorten the buffer or raise the limit",
        )
    kl = config.objective.kl
    if kl.coef > 0 and kl.where == "loss" and kl.estimator == "k1":
        yield Problem(
            "objective.kl.estimator",
            "k1 in the loss",
            "k2 or k3, or where: reward",
            "k1's gradient is 0 in expectation: it adds noise and holds nothing back",
            "warning",
        )
    if config.objective.importance_sampling.is_on and config.rollout.top_p < 1:
        yield Problem(
            "objective.importance_sampling",
            f"on with rollout.top_p {config.rollout.top_p:g}",
            "top_p 1",
            "the engine's log-probs are renormalized over the nucleus, the trainer's are not: all "
            "weights come out too small",
            "warning",
        )


_OF_MODEL: tuple[Callable[[RunConfig, ModelShape, bool], Iterator[Problem]], ...] = (
    *MODEL_RULES,
    auxiliary_losses,
    experts_of_model,
    fused_rope,
    transport_of_device,
    engine_arguments_on,
    engine_reading,
    tokenizer_fits,
    rollout_tokens,
)
_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _batch,
    length,
    context_parallel,
    _algorithm,
    gate,
    _objective,
    old_logprobs,
    engines,
    transports,
    passed_through,
    optimizer_settings,
    learning_rates,
    data_parallel_settings,
    recompute,
    one_model,
    optimizer_modes,
    engine_arguments,
    own_code,
    environment,
    agent,
    sink_libraries,
    server,
    data,
    rows,
    outputs,
    saved_rollouts,
    read_rollouts,
    checkpoints,
)
