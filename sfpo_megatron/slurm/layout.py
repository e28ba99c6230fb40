"""How a run's ranks and engines are spread over the nodes of a job: pure arithmetic.

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
        """A line about GPUs of the job that nobody would use; None without any."""
        rollout = config.rollout
        colocated = rollout.placement == "colocated"
        engines = 0 if colocated else rollout.num_engine_ranks
        used = self.world_size + engines
        num = nodes * gpus_per_node
        if used >= num:
            return None
        # Colocated engines have to be on all of the ranks' GPUs.
        more = f"and rollout.num_engines to {num // rollout.tensor_parallel}, " if colocated else ""
        return (
            f"warning: {num - used} of the {num} GPUs would stay idle; set parallel.data to null, "
            f"which takes what is left, {more}or ask for fewer nodes"
        )


def job_layout(
    config: RunConfig, *, nodes: int, gpus_per_node: int, train_nodes: int | None = None
) -> JobLayout:
    """`train_nodes`: None takes all nodes when colocated, else as few as the ranks need (or, with
    parallel.data null, as many as the engines leave)."""
    parallel, rollout = config.parallel, config.rollout
    engine_gpus = rollout.num_engine_ranks
    colocated = rollout.placement == "colocated"
    if rollout.tensor_parallel > gpus_per_node:
        raise LayoutError(
            "rollout.tensor_parallel",
            str(rollout.tensor_parallel),
            f"at most the {gpus_per_node} GPUs of a node",
            "an engine stays on one node",
        )
    if parallel.data is not None:
        world = parallel.data * parallel.model_size
        train_nodes = train_nodes or (nodes if colocated else -(-world // gpus_per_node))
    elif nodes == 1 and not colocated:
        train_nodes, world = 1, gpus_per_node - engine_gpus
    else:
        engine_nodes = -(-rollout.num_engines // (gpus_per_node // rollout.tensor_parallel))
        train_nodes = train_nodes or (nodes if colocated else nodes - engine_nodes)
        world = train_nodes * gpus_per_node
    _check(config, world, train_nodes, nodes, gpus_per_node)
    if not colocated and world + engine_gpus > nodes * gpus_per_node:
        raise LayoutError(
            "--nodes",
            f"{nodes} nodes of {gpus_per_node} GPUs",
            f"{world} for the trainer and {engine_gpus} for dedicated engines",
            "take more nodes or fewer engines, or set rollout.placement: colocated",
        )
    return JobLayout(train_nodes=train_nodes, ranks_per_node=world // train_nodes)


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
