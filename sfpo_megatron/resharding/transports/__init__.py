"""Weight transports: how full HF-named tensors travel from the trainer into vLLM engines.

`register` is the package's `vllm.general_plugins` entry point: vLLM calls it in the engine actor,
in EngineCore and in every worker, so engines find our backends by name. Only `sender` and the
transport files import vllm, and only when called: it is slow to import and patches torch, so
trainer ranks other than the sender never pay for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BACKENDS = {"sfpo_shm": ("sfpo_megatron.resharding.transports.shm", "ShmEngine", "ShmTrainer")}


def register() -> None:
    """Make our backends known to vLLM by name; safe to call more than once in a process."""
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


def sender(backend: str, *, filler: Any, client: Any, fallback_dir: Path) -> Any:
    """The sending end of a backend on trainer rank 0, already introduced to every engine.

    `filler` is a `Lockstep`. Raises `ManifestError` (by way of `client`) where the engines expect
    other tensors than it declares: before any weight has been touched.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from sfpo_megatron.resharding.transports.shm import ShmTrainerInitInfo

    register()
    assert backend == ShmTrainerInitInfo.backend
    init_info = ShmTrainerInitInfo(rank=0, fallback_dir=str(fallback_dir))
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=filler)
