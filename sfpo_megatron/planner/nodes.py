"""How a run's ranks and engines are spread over nodes: pure arithmetic, of `plan` and of `slurm`.

colocated: every node trains, engines share the ranks' GPUs. dedicated: the first nodes train, the
rest generate; what fits on one node shares it.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def idle(self, config: RunConfig, *, nodes: int, gpus_per_node: int) -> str | None:
        """What to say of GPUs that nobody would use; None without any."""
        rollout = config.rollout
        num = nodes * gpus_per_node
        used = self.world_size + config.num_engine_gpus
        if used >= num:
            return None
        # Colocated engines have to be on all of the ranks' GPUs.
        more = f"and rollout.num_engines to {num // rollout.tensor_parallel}, "
        return (
            f"{num - used} of the {num} GPUs would stay idle; set parallel.data to null, which "
            f"takes what is left, {more if rollout.placement == 'colocated' else ''}or ask for "
            "fewer nodes"
        )


def job_layout(
    config: RunConfig, *, nodes: int, gpus_per_node: int, train_nodes: int | None = None
) -> JobLayout:
    """`train_nodes`: None takes all nodes when colocated, else as few as the ranks need (or, with
    parallel.data null, as many as the engines leave). Raises LayoutError where they do not fit."""
    parallel = config.parallel
    engine_gpus = config.num_engine_gpus
    colocated = config.rollout.placement == "colocated"
    check_engines(config, nodes=nodes, gpus_per_node=gpus_per_node)
    if parallel.data is not None:
        world = parallel.data * parallel.model_size
        train_nodes = train_nodes or (nodes if colocated else -(-world // gpus_per_node))
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
    return JobLayout(train_nodes=train_nodes, ranks_per_node=ranks)


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
            f"at least the {train_nodes} that {world} ranks take on {gpus_per_node} GPUs each",
            "take more nodes or a smaller layout",
        )
    if world % train_nodes or world // train_nodes > gpus_per_node:
        raise LayoutError(
            "parallel",
            f"{world} ranks on {train_nodes} training nodes",
            f"the same number on each, at most {gpus_per_node}",
            "change --train-nodes, parallel.data or --nodes",
        )
