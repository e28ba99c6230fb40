"""Weight transports: how full HF-named tensors travel from the trainer into vLLM engines.

`register` is the package's `vllm.general_plugins` entry point: vLLM calls it in the engine actor,
in EngineCore and in every worker, so engines find our backends by name. Only `sender`, `meet` and
the transport files import vllm, and only when called: it is slow to import and patches torch, so
trainer ranks that do not send never pay for it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sfpo_megatron.families.weight_files import LOAD_FORMAT
from sfpo_megatron.resharding.seams import Driver, SendingEnd, UpdateClient
from sfpo_megatron.resharding.source_pass import Rendezvous, SourcePass

log = logging.getLogger(__name__)

_PACKAGE = "sfpo_megatron.resharding.transports"
_BACKENDS = {
    "sfpo_shm": (f"{_PACKAGE}.shm", "ShmEngine", "ShmTrainer"),
    "sfpo_gloo": (f"{_PACKAGE}.stages", "StagesEngine", "StagesTrainer"),
    "sfpo_nccl_stages": (f"{_PACKAGE}.stages", "NcclStagesEngine", "StagesTrainer"),
}


def register() -> None:
    """Make our backends and our loader known to vLLM by name; safe to call more than once in a
    process. An engine's: the loader takes most of vLLM with it, layers and kernels.

    A warning where this vLLM is another version, which has not what that takes: every vLLM process
    of the environment calls this and would end with an exception, also those that are not ours. Our
    engines find out for themselves (`rollout/vllm_arguments.py`)."""
    try:
        _register_backends()
        _register_loader()
    except Exception as error:  # a name, an attribute or an argument that is not there
        what = f"{type(error).__name__}: {error}"
        log.warning(
            "sfpo_megatron has registered nothing with this vLLM, for which it is not made (%s); "
            "its own engines cannot start here, others can",
            what,
        )
        return
    _ask_for_amx()


def _register_backends() -> None:
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    for backend, (module, engine_class, trainer_class) in _BACKENDS.items():
        # vLLM refuses a second registration, and plugins are loaded more than once.
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, module, engine_class)
        if backend not in WeightTransferTrainerFactory._registry:
            WeightTransferTrainerFactory.register_engine(backend, module, trainer_class)


def _register_loader() -> None:
    from vllm.model_executor import model_loader

    if LOAD_FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        from sfpo_megatron.resharding.transports.first_weights import ListedWeights

        model_loader.register_model_loader(LOAD_FORMAT)(ListedWeights)


def _ask_for_amx() -> None:
    """Ask the kernel for AMX's registers, which each process has to: vLLM's bfloat16 attention on
    CPUs that have AMX uses them unasked, and is ended by SIGILL. Does nothing on other CPUs."""
    import torch

    torch.cpu._init_amx()


def sender(
    backend: str,
    *,
    driver: Driver,
    client: UpdateClient,
    fallback_dir: Path,
    timeout_s: float,
    workers_per_engine: int,
) -> SendingEnd:
    """Make the sending end of a backend on trainer rank 0, already introduced to every engine.

    `driver`: a `Lockstep` for sfpo_shm, else `Streams`. Raises `ManifestError` (by way of `client`)
    where the engines expect other tensors than it declares: before any weight has been touched.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from sfpo_megatron.resharding.transports import shm, stages

    _register_backends()
    if backend == "sfpo_shm":
        init_info = shm.ShmTrainerInitInfo(rank=0, fallback_dir=str(fallback_dir))
    else:
        kinds = (stages.StagesTrainerInitInfo, stages.NcclStagesTrainerInitInfo)
        (kind,) = (kind for kind in kinds if kind.backend == backend)
        init_info = kind(rank=0, timeout_s=timeout_s, workers_per_engine=workers_per_engine)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=driver)


def meet(
    backend: str,
    *,
    driver: SourcePass,
    client: UpdateClient | None,
    rank: int,
    place: Rendezvous,
    bucket_bytes: int,
    timeout_s: float,
    shard_dims: list[int | None] | None,
) -> SendingEnd:
    """Make one rank's end of a transport of vLLM's own: `stock.meet`."""
    from sfpo_megatron.resharding.transports import stock

    return stock.meet(
        backend,
        driver,
        client=client,
        rank=rank,
        place=place,
        bucket_bytes=bucket_bytes,
        timeout_s=timeout_s,
        shard_dims=shard_dims,
    )
