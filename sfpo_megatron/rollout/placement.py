"""The place of each engine: a pure function of the nodes, their devices and the trainer's ranks.

An engine stays on one node: its tensor-parallel workers exchange activations for every token.
dedicated engines take devices that no trainer rank has, packed node after node; in a cluster that
somebody else started on the engines' devices alone, Ray chooses them. colocated engine e takes the
devices of the trainer ranks e*t ... e*t + t-1, whose memory it shares. On nodes without devices
(CPU) engines are dealt out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class PlacementError(ValueError):
    """The engines do not fit; the message says what would."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    id: str
    """Ray's node id."""
    address: str
    """Host name, by which the trainer's ranks know it."""
    devices: tuple[str, ...]
    """Names of its devices, as CUDA_VISIBLE_DEVICES has them. Where Ray chooses, only how many
    there are counts."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RankDevice:
    """The device that a trainer rank computes on."""

    address: str
    device: str
    """Its name on the machine: an index, or a UUID."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Placement:
    """The place of one engine: bound to `node_id`, it sees `devices` only."""

    node_id: str
    devices: tuple[str, ...]
    """Names on the node; empty on a CPU, and where Ray chooses."""
    num_gpus: int = 0
    """Number of GPUs that its actor asks Ray for. 0 with `devices`: Ray knows nothing of the
    trainer, and would hand out its devices too."""
    ranks: tuple[int, ...] = ()
    """Trainer ranks whose memory it shares; empty when dedicated."""


def place_engines(
    nodes: Sequence[Node],
    trainer: Sequence[RankDevice] | None,
    *,
    num_engines: int,
    tensor_parallel: int,
    placement: Literal["dedicated", "colocated"],
) -> tuple[Placement, ...]:
    """Find a placement for each engine. `trainer`: devices by rank; empty on CPU nodes; None where
    Ray has none of the trainer's devices and chooses (dedicated only)."""
    # Ray may have been given none of the devices that colocated engines find by their ranks.
    if not trainer and not any(node.devices for node in nodes):
        return tuple(
            Placement(node_id=nodes[index % len(nodes)].id, devices=())
            for index in range(num_engines)
        )
    if placement == "colocated":
        if trainer is None:
            raise PlacementError("rollout.placement: colocated needs to know the trainer's devices")
        found = _colocated(nodes, trainer, num_engines, tensor_parallel)
    elif trainer is None:
        found = [
            Placement(node_id=node.id, devices=(), num_gpus=tensor_parallel)
            for node in nodes
            for _ in range(len(node.devices) // tensor_parallel)
        ]
    else:
        found = _dedicated(nodes, trainer, tensor_parallel)
    if len(found) < num_engines:
        raise PlacementError(
            f"rollout.num_engines: found {num_engines} of {tensor_parallel} devices each, expected "
            f"at most {len(found)} beside {len(trainer or ())} trainer ranks on "
            f"{[len(node.devices) for node in nodes]} devices; lower num_engines or "
            "tensor_parallel, or start Ray on more nodes"
        )
    return tuple(found[:num_engines])


def _dedicated(nodes: Sequence[Node], trainer: Sequence[RankDevice], size: int) -> list[Placement]:
    """Placements for every engine that fits beside the trainer, node after node."""
    taken = {(rank.address, rank.device) for rank in trainer}
    found = []
    for node in nodes:
        free = [d for d in node.devices if (node.address, d) not in taken]
        found += [
            Placement(node_id=node.id, devices=tuple(free[start : start + size]))
            for start in range(0, len(free) - size + 1, size)
        ]
    return found


def _colocated(
    nodes: Sequence[Node], trainer: Sequence[RankDevice], num_engines: int, size: int
) -> list[Placement]:
    node_ids = {node.address: node.id for node in nodes}
    found = []
    for first in range(0, min(num_engines * size, len(trainer) - size + 1), size):
        ranks = tuple(range(first, first + size))
        addresses = {trainer[rank].address for rank in ranks}
        if len(addresses) > 1:
            raise PlacementError(
                f"rollout.tensor_parallel: an engine of {size} would share memory with ranks "
                f"{ranks[0]} to {ranks[-1]} on {len(addresses)} nodes, expected one; choose a "
                "divisor of the ranks on a node"
            )
        (address,) = addresses
        if address not in node_ids:
            raise PlacementError(
                f"trainer rank {first} is on {address}, which is no node of the Ray cluster "
                f"({sorted(node_ids)}); start Ray there"
            )
        found.append(
            Placement(
                node_id=node_ids[address],
                devices=tuple(trainer[rank].device for rank in ranks),
                ranks=ranks,
            )
        )
    return found
