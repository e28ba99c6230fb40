"""The surroundings of an actor process: its environment variables and its log file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_")
_TORCHRUN_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)

ACTOR_VARIABLES = {
    # One OpenMP thread per process: with more, and any other busy process, a run is 10x slower.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # With tensor_parallel 1 the worker lives in EngineCore's process: one process less to start.
    # AsyncLLM's EngineCore is a process of its own whatever this says; on CPU it means just that.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM gives workers 5 s to end and EngineCore 5 s in all, then kills it before it has unlinked
    # its ring buffers (160 MiB of shared memory).
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    # A forked EngineCore would inherit Ray's threads and locks, and our lifeline's pipe.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Each process of an engine imports 4000 modules: 4 s from byte code, 24 s of CPU without.
    "PYTHONDONTWRITEBYTECODE": "",
}
"""Set for every actor process before it imports anything."""

CPU_ACTOR_VARIABLES = ACTOR_VARIABLES | {
    # Even under enforce_eager vLLM compiles a helper of its sampler: on CPU that takes a C++
    # compiler, without which EngineCore dies at its first request, and seconds of every start.
    "TORCH_COMPILE_DISABLE": "1",
    # A refit makes vLLM allocate and free every layer's tensors, which glibc maps anew each time:
    # a third of its time were page faults. Huge pages are few, and nothing is kept for the next.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""The same for an actor without a GPU."""


def enter_actor(log_file: Path) -> None:
    """First thing in an actor: forget torchrun, and write to `log_file` instead of the console.

    Ray's workers inherit the environment of trainer rank 0. With RANK and MASTER_PORT in it, vLLM
    would join the trainer's process group instead of making its own.
    """
    for name in list(os.environ):
        if name in _TORCHRUN_NAMES or name.startswith(_TORCHRUN_PREFIXES):
            del os.environ[name]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
