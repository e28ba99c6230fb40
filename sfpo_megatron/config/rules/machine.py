"""What the machine has to offer, where a run starts: standard library only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig

SHARED_MEMORY = "/dev/shm"
_CHUNKS = 10  # of vLLM's ring buffer (MessageQueue)
_WORKER_CHUNK_BYTES = 24 << 20  # of the one by which each worker answers
_METADATA_BYTES = 1 << 12


def machine(config: RunConfig) -> Iterator[Problem]:
    """Engines of this machine; those that another Ray cluster places look at their own."""
    if config.debug.train_only is not None or os.environ.get("RAY_ADDRESS"):
        return
    needed, free = ring_buffer_bytes(config), free_shared_memory()
    if free is not None and needed > free:
        yield Problem(
            "rollout.tensor_parallel",
            _found(config, free),
            _expected(needed),
            _FIX,
            "error_here",
        )


def check_shared_memory(config: RunConfig) -> None:
    """The same for the engine of this process, just before it starts: raises RuntimeError."""
    needed, free = ring_buffer_bytes(config), free_shared_memory()
    if free is not None and needed > free:
        raise RuntimeError(
            f"rollout.tensor_parallel: found {_found(config, free)}, expected {_expected(needed)}; "
            f"{_FIX}"
        )


_FIX = (
    "give the container more shared memory (--shm-size=1g or --ipc=host), or set "
    "rollout.tensor_parallel=1, whose engines need none"
)


def _found(config: RunConfig, free: int) -> str:
    return f"{config.rollout.tensor_parallel} with {free >> 20} MiB free in {SHARED_MEMORY}"


def _expected(needed: int) -> str:
    return f"{-(-needed >> 20)} MiB or more, which vLLM's ring buffers take"


def ring_buffer_bytes(config: RunConfig) -> int:
    """Size of the largest shared segment that an engine makes, without which vLLM does not start:
    by it EngineCore tells its workers of each step. Their pages are taken as they are used."""
    if config.rollout.tensor_parallel == 1:
        return 0
    chunk = int(os.environ.get("VLLM_MQ_MAX_CHUNK_BYTES_MB") or 16) << 20
    return _CHUNKS * max(chunk, _WORKER_CHUNK_BYTES) + _METADATA_BYTES


def free_shared_memory() -> int | None:
    """None where there is none: vLLM then looks for no limit either."""
    if not os.path.isdir(SHARED_MEMORY):
        return None
    return shutil.disk_usage(SHARED_MEMORY).free
