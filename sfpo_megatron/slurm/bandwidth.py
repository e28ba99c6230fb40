"""Measures all-reduce inside each node and between pairs of nodes, and names the slow node.

Run under torchrun on every node of a job, with the nodes' names as arguments. All nodes measure
inside at the same time, then all pairs (0,1) (2,3) ..., then (1,2) (3,4) ... and the last with the
first. A node whose every pair is slow is the bad one; where one pair alone is slow, both are named.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from sfpo_megatron.host.addresses import choose_gloo_interface, own_address
from sfpo_megatron.host.gpus import driver, unusable

_BYTES = {"cuda": 512 << 20, "cpu": 4 << 20}
_REPEATS = 5
_LIMIT_S = 180


def rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes that are measured at the same time, round after round; each node is in two
    pairs, if there are three nodes or more."""
    even = [(n, n + 1) for n in range(0, num_nodes - 1, 2)]
    odd = [(n, n + 1) for n in range(1, num_nodes - 1, 2)]
    closing = [(num_nodes - 1, 0)] if num_nodes > 2 else []
    if num_nodes % 2 == 0:
        odd, closing = odd + closing, []
    return [pairs for pairs in (even, odd, closing) if pairs]


def slow_nodes(pairs: Mapping[tuple[int, int], float], least: float) -> dict[int, float]:
    """Node -> its best bandwidth, of those whose every pair is below `least`. Where slow pairs
    remain that have no such node, both of theirs."""
    best: dict[int, float] = {}
    for (a, b), speed in pairs.items():
        for node in (a, b):
            best[node] = max(best.get(node, 0.0), speed)
    slow = {node: speed for node, speed in best.items() if speed < least}
    for (a, b), speed in pairs.items():
        if speed < least and a not in slow and b not in slow:
            slow |= {a: speed, b: speed}
    return slow


def complaints(
    nodes: Sequence[str], slow: Mapping[int, float], *, least: float, where: str, variable: str
) -> list[str]:
    """A line for each node in `slow`, by its number. Where all nodes are, the limit may be what is
    wrong: links differ from cluster to cluster."""
    advice = "leave it out with sbatch --exclude=NODE"
    if len(slow) == len(nodes):
        advice = f"set {variable} in env.sh if the cluster has no faster links, or {advice}"
    return [
        f"{nodes[node]}: found {speed:.3g} GB/s in an all-reduce {where}, expected {least:g} or "
        f"more; {advice}"
        for node, speed in slow.items()
    ]


def bus_gb_s(group: dist.ProcessGroup | None, size: int, device: torch.device) -> float:
    """GB/s by NCCL's measure: bytes / seconds * 2 (n-1) / n. Collective in `group`."""
    buffer = torch.zeros(_BYTES[device.type] // 4, device=device)
    dist.all_reduce(buffer, group=group)  # connects
    _finish(device)
    begun = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(buffer, group=group)
    _finish(device)
    seconds = (time.perf_counter() - begun) / _REPEATS
    return buffer.nbytes / seconds * 2 * (size - 1) / size / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _meet_over_gloo() -> None:
    """Raise, with this rank's address, where the control plane of a run could not connect.
    Collective."""
    try:
        dist.barrier(group=dist.new_group(backend="gloo", timeout=timedelta(seconds=_LIMIT_S)))
    except RuntimeError as error:
        raise SystemExit(
            f"preflight: {os.environ.get('SLURMD_NODENAME', '')}: gloo, which listens on "
            f"{own_address()}, did not reach all nodes ({' '.join(str(error).split())[:200]}); set "
            "GLOO_SOCKET_IFNAME in env.sh to the network interface that the nodes share"
        ) from None


def _unusable() -> str | None:
    """What keeps torch from this node's GPUs; None where there are none."""
    return unusable(
        driver(),
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        why="it names no device",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 3 on rank 0 with a line for each slow node. Collective over all ranks."""
    parser = argparse.ArgumentParser(prog="bandwidth", description=__doc__)
    parser.add_argument("--in-node", type=float, required=True, metavar="GB/S")
    parser.add_argument("--between-nodes", type=float, required=True, metavar="GB/S")
    parser.add_argument("nodes", nargs="+")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and (fault := _unusable()) is not None:
        print(f"preflight: {os.environ.get('SLURMD_NODENAME', '')}: {fault}", file=sys.stderr)
        return 3
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    choose_gloo_interface()
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=_LIMIT_S))
    _meet_over_gloo()
    per_node, me = int(os.environ["LOCAL_WORLD_SIZE"]), dist.get_rank()
    my_node = me // per_node

    def measure(groups: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """GB/s of each group of nodes, on every rank. Collective over all ranks."""
        made = []  # all of them before the first is used: making one waits for every rank
        for nodes in groups:
            ranks = [node * per_node + local for node in nodes for local in range(per_node)]
            made.append((nodes, dist.new_group(ranks)))
        mine = -1.0
        for nodes, group in made:
            if my_node in nodes:
                mine = bus_gb_s(group, len(nodes) * per_node, device)
        everyones: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        return {nodes: everyones[nodes[0] * per_node] for nodes in groups}

    num_nodes = len(options.nodes)
    inside = measure([(node,) for node in range(num_nodes)]) if per_node > 1 else {}
    pairs: dict[tuple[int, int], float] = {}
    for round_of_pairs in rounds(num_nodes):
        pairs |= {(n[0], n[1]): speed for n, speed in measure([*round_of_pairs]).items()}
    dist.destroy_process_group()
    if me != 0:
        return 0
    lines = complaints(
        options.nodes,
        {node[0]: speed for node, speed in inside.items() if speed < options.in_node},
        least=options.in_node,
        where="of its GPUs",
        variable="SFPO_MIN_GB_S_IN_NODE",
    )
    lines += complaints(
        options.nodes,
        slow_nodes(pairs, options.between_nodes),
        least=options.between_nodes,
        where="with its neighbours",
        variable="SFPO_MIN_GB_S_BETWEEN_NODES",
    )
    for line in lines:
        print(f"preflight: {line}", file=sys.stderr)
    for name, speeds in (("inside nodes", inside.values()), ("between nodes", pairs.values())):
        if speeds:
            print(f"all-reduce {name}: {min(speeds):.3g} to {max(speeds):.3g} GB/s", flush=True)
    return 3 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
