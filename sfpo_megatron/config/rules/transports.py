"""Which ways of refit a layout has: vLLM's own transports carry less than ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from sfpo_megatron.config.rollout import Transport
from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.host.nccl import LIBRARY, nccl_version

OURS = "set refit.transport: nccl_stages"
_MAX_SOURCE_SHARDS = 16
_NCCL_OF_M2N = (2, 30, 5)


def chosen(config: RunConfig, *, one_node: bool, on_cpu: bool) -> RunConfig:
    """`config` with another transport in place of `auto`. `one_node`: all engines are on the node
    of the trainer's rank 0."""
    if config.refit.transport != "auto":
        return config
    if one_node:
        return with_transport(config, "shm")
    if on_cpu:
        return with_transport(config, "gloo")
    if config.rollout.placement == "dedicated":
        return with_transport(config, "nccl_stages")
    return with_transport(config, "gloo" if config.refit.verify_every else "ipc")


def with_transport(config: RunConfig, transport: Transport) -> RunConfig:
    """`config` with `refit.transport` set."""
    return replace(config, refit=replace(config.refit, transport=transport))


def transports(config: RunConfig) -> Iterator[Problem]:
    """Refusals that need neither the model nor the device."""
    refit, rollout = config.refit, config.rollout
    if refit.transport == "ipc" and rollout.placement != "colocated":
        yield Problem(
            "refit.transport",
            f"ipc with rollout.placement: {rollout.placement}",
            "rollout.placement: colocated",
            "set that, or another transport: an engine opens memory of its own device alone",
        )
    if refit.is_vllms_own and refit.verify_every:
        yield Problem(
            "refit.verify_every",
            f"{refit.verify_every} with refit.transport: {refit.transport}",
            "0",
            f"set it to 0, or {OURS}: vLLM's own receivers compute no checksums",
        )
    if refit.survives_interruption and "worker_extension_cls" in rollout.engine_args:
        yield Problem(
            "rollout.engine_args.worker_extension_cls",
            f"set with refit.transport: {refit.transport}",
            "nothing: this transport's own extension is there",
            "remove it, or set refit.transport: auto",
        )
    if refit.transport == "nccl_m2n":
        yield from _one_mesh_a_side(config)


def _one_mesh_a_side(config: RunConfig) -> Iterator[Problem]:
    """nccl_m2n describes each side by one grid of ranks, replicas x shards, on which every rank
    holds a part of every tensor (vllm/distributed/weight_transfer/m2n_common.py, M2NMesh)."""
    parallel = config.parallel
    for name, size, why in (
        ("pipeline", parallel.pipeline, "a stage holds other layers"),
        ("expert", parallel.expert, "an expert-parallel rank holds other experts"),
    ):
        if size > 1:
            yield Problem(
                f"parallel.{name}",
                f"{size} with refit.transport: nccl_m2n",
                "1: every rank has to hold a part of every tensor",
                f"{OURS}: {why}",
            )
    if parallel.expert_tensor not in (1, parallel.tensor):
        yield Problem(
            "parallel.expert_tensor",
            f"{parallel.expert_tensor} with refit.transport: nccl_m2n",
            f"1 or parallel.tensor ({parallel.tensor}): one grid describes all tensors",
            f"set one of the two, or {OURS}",
        )
    if parallel.tensor > _MAX_SOURCE_SHARDS:
        yield Problem(
            "parallel.tensor",
            f"{parallel.tensor} with refit.transport: nccl_m2n",
            f"at most {_MAX_SOURCE_SHARDS}, of which it can make one tensor (m2n_common.py)",
            OURS,
        )
    if config.rollout.num_engines > 1:
        yield Problem(
            "rollout.num_engines",
            f"{config.rollout.num_engines} with refit.transport: nccl_m2n",
            "1: vLLM numbers the workers of a single engine (m2n_engine.py, rank_offset)",
            f"set it to 1, or {OURS}",
        )


def transport_of_device(config: RunConfig, model: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """A rule like `MODEL_RULES`: known once it is known where the run is."""
    transport = config.refit.transport
    if on_cpu and (transport == "nccl_stages" or config.refit.is_vllms_own):
        fix = "set refit.transport: gloo"
        if transport == "nccl_stages":
            fix += ", which is the same over another library"
        yield Problem(
            "refit.transport",
            f"{transport} without a CUDA device",
            "gloo, shm or auto here",
            fix,
            "error_when_training",
        )
    if not on_cpu and transport == "nccl_m2n":
        yield from _libraries_of_m2n()


def _libraries_of_m2n() -> Iterator[Problem]:
    """flashinfer brings the packages, but for another NCCL than torch's (m2n_common.py,
    _IMPORT_HINT): by itself vLLM would say so at the first refit."""
    if find_spec("nccl") is None:
        yield Problem(
            "refit.transport",
            "nccl_m2n without nccl-extensions",
            "the Python package nccl.m2n, which vLLM does not bring",
            f"install nccl-extensions and nccl4py, or {OURS}",
            "error_here",
        )
        return
    version = nccl_version()
    if version is None or version < _NCCL_OF_M2N:
        found = "an NCCL that does not say its version"
        if version is not None:
            found = f"NCCL {'.'.join(map(str, version))}"
        yield Problem(
            "refit.transport",
            f"nccl_m2n with {found}",
            f"{'.'.join(map(str, _NCCL_OF_M2N))} or newer",
            f"set {LIBRARY} to the libnccl.so.2 that nccl-extensions was built with, or {OURS}",
            "error_here",
        )
