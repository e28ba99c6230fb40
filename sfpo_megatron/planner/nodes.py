"""How a run's ranks and engines are spread over nodes: pure arithmetic, of `plan` and of `slurm`.

colocated: every node trains, engines share the ranks' GPUs. dedicated: the first nodes train, the
rest generate; what fits on one node shares it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import InputError


class LayoutError(InputError):
    """The run does not fit the nodes."""


@dataclass(kw_only=True, frozen=True, slots=True)
class JobLayout:
    """What torchrun is told."""

    train_nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.train_nodes * self.ranks_per_node

    def keeps_together(self, size: int) -> bool:
        """Whether every group of `size` neighbouring ranks is on one node."""
        return self.ranks_per_node % size == 0


def job_layout(
    config: RunConfig, *, nodes: int, gpus_per_node: int, train_nodes: int | None = None
) -> JobLayout:
    """`train_nodes`: None takes all nodes when colocated, else as few as hold the ranks, the same
    number on each (or, with parallel.data null, as many as the engines leave). Raises LayoutError
    where they do not fit."""
    parallel = config.parallel
    engine_gpus = config.num_engine_gpus
    colocated = config.rollout.placement == "colocated"
    if train_nodes is not None and train_nodes > nodes:
        raise LayoutError(
            "--train-nodes",
            str(train_nodes),
            f"at most the {nodes} of --nodes",
            "lower it or take more nodes",
        )
    check_engines(config, nodes=nodes, gpus_per_node=gpus_per_node)
    if parallel.data is not None:
        world = parallel.data * parallel.model_size
        train_nodes = train_nodes or (
            nodes if colocated else densest(world, gpus_per_node).train_nodes
        )
    elif nodes == 1 and not colocated:
        train_nodes, world = 1, gpus_per_node - engine_gpus
    else:
        train_nodes = train_nodes or nodes - engine_nodes(config, gpus_per_node=gpus_per_node)
        world = train_nodes * gpus_per_node
    _check(config, world, train_nodes, nodes, gpus_per_node)
    ranks = world // train_nodes
    beside = engine_nodes(
        config, gpus_per_node=gpus_per_node, train_nodes=train_nodes, ranks_per_node=ranks
    )
    if train_nodes + beside > nodes:
        size = config.rollout.tensor_parallel
        raise LayoutError(
            "--nodes",
            f"{nodes} nodes of {gpus_per_node} GPUs",
            f"{train_nodes + beside}: {world} GPUs train, {engine_gpus} generate, {size} of a node "
            "together",
            "take more nodes or fewer engines, or set rollout.placement: colocated",
        )
    layout = JobLayout(train_nodes=train_nodes, ranks_per_node=ranks)
    if colocated and config.debug.train_only is None:
        _check_shared(config, layout)
    return layout


def densest(world: int, gpus_per_node: int) -> JobLayout:
    """`world` ranks on the fewest nodes that hold them, the same number on each."""
    on_each = range(min(world, gpus_per_node), 0, -1)
    ranks = next(ranks for ranks in on_each if world % ranks == 0)
    return JobLayout(train_nodes=world // ranks, ranks_per_node=ranks)


def least_nodes(config: RunConfig, *, gpus_per_node: int) -> int:
    """The fewest nodes that `job_layout` takes; `parallel.data` must be a number. Raises
    LayoutError where no number of them would do."""
    layout = densest((config.parallel.data or 1) * config.parallel.model_size, gpus_per_node)
    nodes = layout.train_nodes + engine_nodes(
        config,
        gpus_per_node=gpus_per_node,
        train_nodes=layout.train_nodes,
        ranks_per_node=layout.ranks_per_node,
    )
    job_layout(config, nodes=nodes, gpus_per_node=gpus_per_node)
    return nodes


def idle_advice(
    config: RunConfig, *, nodes: int, gpus_per_node: int, train_nodes: int | None = None
) -> str | None:
    """What to say of GPUs that nobody would use in such a job; None without any. Raises LayoutError
    as `job_layout`."""
    layout = job_layout(config, nodes=nodes, gpus_per_node=gpus_per_node, train_nodes=train_nodes)
    num = nodes * gpus_per_node
    idle = num - layout.world_size - config.num_engine_gpus
    if idle <= 0:
        return None

    def left(other: RunConfig, nodes: int = nodes) -> float:
        """GPUs that nobody would use then; infinite where no such job is laid out, or one of fewer
        ranks."""
        try:
            found = job_layout(
                other, nodes=nodes, gpus_per_node=gpus_per_node, train_nodes=train_nodes
            )
        except LayoutError:
            return math.inf
        if found.world_size < layout.world_size:
            return math.inf
        return nodes * gpus_per_node - found.world_size - other.num_engine_gpus

    def ways() -> Iterator[str]:
        size, colocated = config.rollout.tensor_parallel, config.rollout.placement == "colocated"
        if left(replace(config, parallel=replace(config.parallel, data=None))) < idle:
            # Colocated engines have to be on all of the ranks' GPUs.
            more = f", and rollout.num_engines to {num // size}" if colocated else ""
            yield f"set parallel.data to null, which takes what is left{more}"
        fewer = range(-(-layout.world_size // gpus_per_node), nodes)
        if fewest := next((n for n in fewer if left(config, n) < idle), 0):
            yield f"ask for {fewest} nodes" if fewest > 1 else "ask for 1 node"
        beside = (gpus_per_node - layout.ranks_per_node) // size * layout.train_nodes
        engines = beside + gpus_per_node // size * (nodes - layout.train_nodes)
        more_engines = replace(config.rollout, num_engines=max(engines, 1))
        if left(replace(config, rollout=more_engines)) < idle:
            yield f"raise rollout.num_engines to {engines}"

    advice = (
        ", or ".join(ways()) or "set parallel or rollout.tensor_parallel to sizes that fill a node"
    )
    return f"{idle} of the {num} GPUs would stay idle; {advice}"


def crossing_advice(config: RunConfig, layout: JobLayout) -> str | None:
    """What to say of tensor-parallel groups, whose ranks are neighbours, that are not each on one
    node; None without any."""
    size, ranks = config.parallel.tensor, layout.ranks_per_node
    if layout.keeps_together(size):
        return None
    return (
        f"groups of parallel.tensor {size} lie across nodes of {ranks} ranks, and every layer "
        f"waits for the network; take one that divides {ranks}, and a larger parallel.pipeline for "
        "the memory"
    )


def engine_nodes(
    config: RunConfig, *, gpus_per_node: int, train_nodes: int = 0, ranks_per_node: int = 0
) -> int:
    """Nodes that engines of their own take, beside what training nodes leave them."""
    size = config.rollout.tensor_parallel
    if config.num_engine_gpus == 0:
        return 0
    if size > gpus_per_node:  # what does not fit on one
        return config.rollout.num_engines * -(-size // gpus_per_node)
    beside_ranks = train_nodes * ((gpus_per_node - ranks_per_node) // size)
    return -(-max(config.rollout.num_engines - beside_ranks, 0) // (gpus_per_node // size))


def check_engines(config: RunConfig, *, nodes: int, gpus_per_node: int) -> None:
    """Raise LayoutError where the engines do not fit the nodes, whatever else is there."""
    rollout = config.rollout
    if config.debug.train_only is None and rollout.tensor_parallel > gpus_per_node:
        raise LayoutError(
            "rollout.tensor_parallel",
            str(rollout.tensor_parallel),
            f"at most the {gpus_per_node} GPUs of a node",
            "an engine stays on one node",
        )
    needed = engine_nodes(config, gpus_per_node=gpus_per_node)
    if needed > nodes:
        raise LayoutError(
            "--nodes",
            str(nodes),
            f"at least the {needed} that {rollout.num_engines} engines of "
            f"{rollout.tensor_parallel} GPUs take",
            "take more nodes or fewer engines",
        )


def _check_shared(config: RunConfig, layout: JobLayout) -> None:
    """Raise LayoutError where rollout/placement.py would once the job runs: an engine has the GPUs
    of neighbouring ranks, all on one node."""
    size, ranks = config.rollout.tensor_parallel, layout.ranks_per_node
    if layout.train_nodes > 1 and not layout.keeps_together(size):
        raise LayoutError(
            "rollout.tensor_parallel",
            f"{size} with rollout.placement: colocated and {ranks} ranks on each of "
            f"{layout.train_nodes} nodes",
            f"a divisor of {ranks}: an engine is on the GPUs of ranks of one node",
            "change it, parallel or the number of nodes",
        )


def _check(config: RunConfig, world: int, train_nodes: int, nodes: int, gpus_per_node: int) -> None:
    size = config.parallel.model_size
    if world < size or world % size:
        raise LayoutError(
            "parallel",
            f"{max(world, 0)} GPUs for the trainer",
            f"a multiple of {size} (tensor x pipeline x context)",
            "change --nodes, the layout, or the engines' number",
        )
    if not 1 <= train_nodes <= nodes:
        raise LayoutError(
            "--nodes",
            str(nodes),
            f"at least the {train_nodes} that {world} ranks take, as many on each and at most "
            f"{gpus_per_node}",
            "take more nodes or a smaller layout",
        )
    if world % train_nodes or world // train_nodes > gpus_per_node:
        raise LayoutError(
            "parallel",
            f"{world} ranks on {train_nodes} training nodes",
            f"the same number on each, at most {gpus_per_node}",
            "change --train-nodes, parallel.data or --nodes",
        )
