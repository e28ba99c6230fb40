"""The Ray cluster: one of our own on loopback, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    AuthenticationError,
    OutOfMemoryError,
    RayActorError,
    RuntimeEnvSetupError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sfpo_megatron.host.gpus import devices_of_own_node
from sfpo_megatron.host.scratch import Scratch, is_scratch
from sfpo_megatron.host.temporary import short_folder
from sfpo_megatron.host.variables import settle
from sfpo_megatron.plugins import search_path
from sfpo_megatron.rollout.actor_variables import ActorRole, actor_variables
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.joining import what_is_missing, wrong_address
from sfpo_megatron.rollout.placement import Node, Placement

_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # batches are small; Ray's default is a third of the memory
_CONNECT_S = 20.0

# A machine whose cores are all taken answers late; the guards of our own (client, lifeline) notice
# a process that is really gone within seconds.
_PATIENCE = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 10}

ACTOR_GONE = (RayActorError, OutOfMemoryError, ActorUnschedulableError, RuntimeEnvSetupError)
"""What Ray raises from a call to an actor that is no longer there, or that could not be made: its
node has gone."""


def why_gone(error: Exception) -> str:
    """One of `ACTOR_GONE` in a few words; Ray's own text has fifty lines."""
    if isinstance(error, OutOfMemoryError):
        return "Ray ended it: the machine's memory is nearly full"
    if isinstance(error, ActorUnschedulableError):
        return "Ray cannot place it: its node has left the cluster"
    if isinstance(error, RuntimeEnvSetupError):
        return "Ray could not set up its process"
    return "its actor's process ended"


def start_cluster() -> bool:
    """Connect this process to Ray; whether the cluster is ours to end."""
    if ray.is_initialized():
        return False
    settle("rank", "starts Ray")
    # ray.init puts its own SIGTERM handler in place of the trainer's.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address := os.environ.get("RAY_ADDRESS"):
            _join(address)
            return False
        folder = _session_folder()
        ray.init(
            address="local",
            num_cpus=1,  # also how many idle workers Ray starts ahead; our actors ask for none
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _system_config=_PATIENCE,
            _temp_dir=folder,
        )
        # Ray has opened it to every user (_private/utils.py, try_to_create_directory): whoever may
        # write there may put a socket in the place of one of ours.
        os.chmod(folder, 0o700)
        return True
    finally:
        signal.signal(signal.SIGTERM, handler)


_folders: list[Scratch] = []  # one at most: a process has one cluster


def _session_folder() -> str:
    """The folder of Ray's session: the run's own (host/temporary.py), which the run removes; one of
    the cluster's own where nobody has made a run's."""
    if is_scratch(tempfile.gettempdir()):
        return tempfile.gettempdir()
    _folders.append(short_folder())
    return _folders[0].path


def _join(address: str) -> None:
    """Join the cluster at `address`. Ray reads RAY_AUTH_MODE and the token itself."""
    if (expected := wrong_address(address)) is not None:
        raise RolloutError(
            _cannot_join(address, "it is no head's address", f"{expected}; set that")
        )
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for two minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        fix = "a Ray cluster that runs there; correct the address"
        raise RolloutError(_cannot_join(address, str(error), fix)) from error
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, AuthenticationError) as error:
        why = str(error).strip().partition(". ")[0]
        fix = f"a Ray cluster that lets us in; {what_is_missing()}"
        raise RolloutError(_cannot_join(address, why, fix)) from error


def _cannot_join(address: str, why: str, expected: str) -> str:
    return (
        f"RAY_ADDRESS: found {address}, which cannot be joined ({why}), expected {expected}, or "
        "unset RAY_ADDRESS for a cluster of the run's own"
    )


def nodes(*, is_ours: bool) -> list[Node]:
    """The cluster's living nodes, this process's own first. `is_ours`: this process has started the
    cluster, so that it has this process's devices."""
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"], node["NodeID"]))
    return [
        Node(
            id=node["NodeID"],
            # Not Ray's address: a host may have several, and know itself by 127.0.1.1.
            address=node["NodeManagerHostname"],
            devices=_devices(int(node["Resources"].get("GPU", 0)), is_ours=is_ours),
        )
        for node in alive
    ]


def _devices(num_counted: int, *, is_ours: bool) -> tuple[str, ...]:
    """Names of a node's devices, which Ray only counts. On a cluster of somebody else nobody goes
    by the names: Ray chooses for dedicated engines, and colocated ones have their ranks' own."""
    if is_ours:
        return devices_of_own_node(num_counted)
    return tuple(map(str, range(num_counted)))


def create_actor(
    actor_class: type,
    *args: Any,
    placement: Placement,
    role: ActorRole = "engine",
    is_restart: bool = False,
    **kwargs: Any,
) -> Any:
    """Start an actor in a process of its own where `placement` says, with the environment of its
    role and the modules that are found here."""
    on_gpu = bool(placement.devices or placement.num_gpus)
    variables = actor_variables(role, on_gpu=on_gpu, is_restart=is_restart)
    # A user's own code is found there as it is here: actors may have another working directory.
    variables["PYTHONPATH"] = search_path()
    if placement.devices:
        # Ray would hide all devices from an actor that asks for none.
        variables["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
    return (
        ray.remote(actor_class)
        .options(
            num_cpus=0,
            num_gpus=placement.num_gpus,
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(placement.node_id, soft=False),
            runtime_env={"env_vars": variables},
        )
        .remote(*args, **kwargs)
    )


def stop_cluster() -> None:
    """Leave Ray, which ends a cluster of our own with all its processes."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)
    while _folders:
        _folders.pop().remove()
