"""The Ray cluster: one of our own on loopback, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import signal
import socket

import ray
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError

from sfpo_megatron.rollout.errors import RolloutError

_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # batches are small; Ray's default is a third of the memory
_CONNECT_S = 20.0

# A machine whose cores are all taken answers late; the guards of our own (client, lifeline) notice
# a process that is really gone within seconds.
_PATIENCE = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 10}

ACTOR_GONE = (RayActorError, OutOfMemoryError)
"""What Ray raises from a call to an actor that is no longer there."""


def why_gone(error: Exception) -> str:
    """One of `ACTOR_GONE` in a few words; Ray's own text has fifty lines."""
    if isinstance(error, OutOfMemoryError):
        return "Ray ended it: the machine's memory is nearly full"
    return "its actor's process ended"


def start_cluster() -> bool:
    """Connect this process to Ray; whether the cluster is ours to end."""
    if ray.is_initialized():
        return False
    # No call home, and no warning about variables that Ray will stop setting.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # ray.init puts its own SIGTERM handler in place of the trainer's.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address := os.environ.get("RAY_ADDRESS"):
            _join(address)
            return False
        ray.init(
            address="local",
            num_cpus=1,  # also how many idle workers Ray starts ahead; our actors ask for none
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _system_config=_PATIENCE,
        )
        return True
    finally:
        signal.signal(signal.SIGTERM, handler)


def _join(address: str) -> None:
    """Ray reads RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH itself."""
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray itself would try for two minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, AuthenticationError) as error:
        why = str(error).strip().partition(". ")[0]
        raise RolloutError(
            f"RAY_ADDRESS: found {address}, which cannot be joined ({why}), expected a Ray cluster "
            "that runs, and its token in RAY_AUTH_TOKEN_PATH; unset RAY_ADDRESS for a cluster of "
            "the run's own"
        ) from error


def stop_cluster() -> None:
    """Leave Ray; ends a cluster of our own with all its processes."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)
