"""Makes a policy ready to train of a config: process groups, model, weights, DDP, optimizer.

Call order:

    init_distributed(config)                 # process groups, seeds; CPU bridge where no CUDA is
    policy = build_policy(config, schedule)  # weights loaded, optimizer built
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.families.shape import ModelShape, model_shape, read_hf_config
from sfpo_megatron.host.addresses import choose_gloo_interface
from sfpo_megatron.host.gpus import own_device
from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.host.variables import settle
from sfpo_megatron.mcore.capabilities import Capabilities, expect_no_gpu, probe
from sfpo_megatron.mcore.control import ControlGroup
from sfpo_megatron.mcore.device_choices import fuses_weight_gradients
from sfpo_megatron.mcore.schedule import LRSchedule, scheduler_of
from sfpo_megatron.mcore.statistics import Statistics

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import TransformerConfig

    from sfpo_megatron.mcore.aux_losses import AuxLosses
    from sfpo_megatron.mcore.shards import MainParamShards

T = TypeVar("T")


@dataclass(kw_only=True, frozen=True, slots=True)
class Layout:
    """This rank's place in the parallel layout."""

    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    is_last_stage: bool


@dataclass(kw_only=True, frozen=True)
class Policy:
    """The model under training on this rank and everything one train step needs."""

    dtype: str
    """Dtype of the model params, as `model.dtype` names it."""
    parallel: ParallelConfig
    """The layout that was asked for; `layout` is this rank's place in it."""
    logprob_chunk_tokens: int
    """Tokens whose logits are turned into fp32 at a time."""
    shape: ModelShape
    layout: Layout
    capabilities: Capabilities
    chunks: list[DistributedDataParallel]
    """Model chunks, one per virtual pipeline stage."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    shards: MainParamShards
    control: ControlGroup
    statistics: Statistics
    aux_losses: AuxLosses | None
    """The routers' auxiliary losses, where they are turned on."""


def init_distributed(config: RunConfig) -> Capabilities:
    """Start torch.distributed, by torchrun's environment, and Megatron's groups. Collective."""
    _quieten_dependencies()
    choose_gloo_interface()
    order_kernels(config)
    capabilities = probe(config.model.transformer_impl)
    if capabilities.cuda:
        log_unverified("running on CUDA")
        torch.cuda.set_device(own_device(torch.cuda.device_count()))
    else:
        expect_no_gpu()
        from sfpo_megatron.mcore import cpu

        cpu.install()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if capabilities.cuda else "gloo",
            timeout=timedelta(seconds=config.train.control_timeout_s),
        )
    from megatron.core import parallel_state, tensor_parallel

    parallel = config.parallel
    if dist.get_world_size() % parallel.model_size or parallel.data not in (
        None,
        dist.get_world_size() // parallel.model_size,
    ):
        raise ValueError(
            f"parallel: found a world of {dist.get_world_size()} ranks, expected data x tensor x "
            f"pipeline x context = {parallel.data} x {parallel.tensor} x {parallel.pipeline} x "
            f"{parallel.context}; start that many ranks"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        num_distributed_optimizer_instances=config.megatron.ddp.get(
            "num_distributed_optimizer_instances", 1
        ),
        distributed_timeout_minutes=math.ceil(config.train.control_timeout_s / 60),
    )
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    return capabilities


_ADVISERS = (
    "megatron.core.models.gpt.gpt_model",  # 0.19: a class to come in its place
    "megatron.core.distributed.distributed_data_parallel",  # 0.19: it makes a layout by itself
    "torch.utils.cpp_extension",  # a CUDA toolkit without a GPU
)
"""Loggers whose warnings are advice that no user of ours can follow."""


def order_kernels(config: RunConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have kernels start in the order they are queued in where collectives of tensor or context
    parallelism are to overlap with GEMMs. Before anything asks for a device: CUDA reads the
    variable once."""
    parallel = config.parallel
    if parallel.tensor > 1 or parallel.context > 1:
        settle("rank", "ordered kernels", environ=environ)


def _quieten_dependencies() -> None:
    """Silence what Megatron warns of on import: the fallbacks that it takes (`Capabilities` says
    them in one line), and the collectives that it calls by names deprecated in this torch."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # From Python 3.12 on, while a module is compiled; there its file stands for its name.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*/megatron/core/")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in _ADVISERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def current_layout() -> Layout:
    """This rank's place in Megatron's parallel state."""
    from megatron.core import parallel_state as ps

    return Layout(
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=ps.get_tensor_model_parallel_world_size(),
        expert_rank=ps.get_expert_model_parallel_rank(),
        expert_size=ps.get_expert_model_parallel_world_size(),
        expert_tensor_rank=ps.get_expert_tensor_parallel_rank(),
        expert_tensor_size=ps.get_expert_tensor_parallel_world_size(),
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=ps.get_pipeline_model_parallel_world_size(),
        context_rank=ps.get_context_parallel_rank(),
        context_size=ps.get_context_parallel_world_size(),
        is_last_stage=ps.get_pipeline_model_parallel_rank()
        == ps.get_pipeline_model_parallel_world_size() - 1,
    )


def _wrap(
    config: RunConfig, tconfig: TransformerConfig, chunks: list[GPTModel]
) -> list[DistributedDataParallel]:
    """Wrap in Float16Module where params are bf16 or fp16, then in DistributedDataParallel."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module

    from sfpo_megatron.mcore.experts import exact_choice_biases
    from sfpo_megatron.mcore.settings import ddp_config

    settings = ddp_config(config)
    wrapped = []
    for index, chunk in enumerate(chunks):
        if torch.cuda.is_available():
            chunk = chunk.cuda(torch.cuda.current_device())
        if tconfig.bf16 or tconfig.fp16:
            with exact_choice_biases(chunk):
                chunk = Float16Module(tconfig, chunk)
        wrapped.append(
            DistributedDataParallel(tconfig, settings, chunk, disable_bucketing=index > 0)
        )
    return wrapped


def _build_optimizer(
    config: RunConfig,
    tconfig: TransformerConfig,
    chunks: list[DistributedDataParallel],
    schedule: LRSchedule,
) -> MegatronOptimizer:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import get_megatron_optimizer

    from sfpo_megatron.mcore.finite_gradients import skip_non_finite
    from sfpo_megatron.mcore.settings import optimizer_config

    rates = {"lr": schedule.peak, "min_lr": schedule.lowest}  # the scheduler reads them there
    settings = optimizer_config(config, tconfig, chunks[0].ddp_config, rates)
    optimizer = get_megatron_optimizer(settings, chunks)
    skip_non_finite(optimizer)
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's Adam; Megatron has no setting for it
            group["fused"] = True  # one kernel a step instead of a dozen a tensor
    # A missing finalize function passes every test at DP = TP = 1 and is wrong everywhere else.
    tconfig.finalize_model_grads_func = finalize_model_grads
    if chunks[0].ddp_config.overlap_grad_reduce:
        tconfig.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
        tconfig.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in chunks])
    if chunks[0].ddp_config.overlap_param_gather and chunks[0].ddp_config.align_param_gather:
        tconfig.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in chunks])
    return optimizer


def _one_or_list(functions: list[T]) -> T | list[T]:
    return functions if len(functions) > 1 else functions[0]


def build_policy(
    config: RunConfig, capabilities: Capabilities, schedule: LRSchedule, *, model_path: str
) -> Policy:
    """Build the model with the weights of `model_path`, DDP, optimizer, schedule. Collective."""
    from sfpo_megatron.mcore.aux_losses import AuxLosses
    from sfpo_megatron.mcore.model import build_chunks
    from sfpo_megatron.mcore.settings import transformer_config
    from sfpo_megatron.mcore.shards import MainParamShards
    from sfpo_megatron.mcore.weights import load_hf_weights

    shape = model_shape(read_hf_config(model_path))
    layout = current_layout()
    tconfig = transformer_config(shape, config, capabilities)
    fuse = fuses_weight_gradients(config, capabilities)
    chunks = build_chunks(shape, tconfig, capabilities, fuse_gradients=fuse)
    load_hf_weights(
        chunks,
        shape,
        model_path,
        tensor=(layout.tensor_rank, layout.tensor_size),
        expert_tensor=(layout.expert_tensor_rank, layout.expert_tensor_size),
    )
    chunks = _wrap(config, tconfig, chunks)
    optimizer = _build_optimizer(config, tconfig, chunks, schedule)
    aux_losses = AuxLosses.of(chunks, optimizer.scale_loss)
    tconfig.grad_scale_func = aux_losses.grad_scale if aux_losses else optimizer.scale_loss
    scheduler = scheduler_of(optimizer, schedule, config.train.optimizer.weight_decay)
    control = ControlGroup(config.train.control_timeout_s)
    return Policy(
        dtype=config.model.dtype,
        parallel=config.parallel,
        logprob_chunk_tokens=config.train.logprob_chunk_tokens,
        shape=shape,
        layout=layout,
        capabilities=capabilities,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        shards=MainParamShards(optimizer, defer_gathers=True),
        control=control,
        statistics=Statistics(control),
        aux_losses=aux_losses,
    )


def shut_down() -> None:
    """Leave Megatron's parallel state and torch.distributed; tests build several in one process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
