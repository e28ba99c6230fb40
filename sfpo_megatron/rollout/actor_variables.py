"""The surroundings of an actor process: its environment variables and its log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, MutableMapping
from pathlib import Path
from typing import Literal, TypeAlias

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.home import provide_home
from sfpo_megatron.host.variables import forget, settle, variables

ActorRole: TypeAlias = Literal["controller", "engine"]


def actor_variables(role: ActorRole, *, on_gpu: bool, is_restart: bool = False) -> dict[str, str]:
    """Set for an actor before it imports anything."""
    start: Literal["restart", "first start"] = "restart" if is_restart else "first start"
    return variables(role, "gpu" if on_gpu else "cpu", start)


def yield_to(engine_args: Container[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Take from an engine's process a variable that vLLM would let go before one of these (`Legacy
    setting` in vllm/platforms/cpu.py)."""
    if "kv_cache_memory_bytes" in engine_args:
        environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def settle_engine(config: RunConfig) -> None:
    """Set the variables of an engine's process that its config decides, before vLLM is imported."""
    if config.refit.transport == "ipc":
        settle("engine", "ipc")
    yield_to(config.rollout.engine_args)


def enter_actor(log_file: Path) -> None:
    """First thing in an actor: forget what Ray's workers inherit of trainer rank 0 alone, write to
    `log_file` instead of the console, and have a home folder: in a cluster that others started no
    process of ours has provided one on this node. NoHome where it cannot."""
    forget("engine")  # as a controller does
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    if (said := provide_home()) is not None:
        print(said, flush=True)
