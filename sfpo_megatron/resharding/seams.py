"""The seams of a refit, as Protocols: what each part asks of its neighbours.

    source  ->  driver  ->  sending end  ->  client  ->  engines

A source holds the trainer's weights. A driver goes through them on every trainer rank, in lockstep.
A sending end is the trainer's side of a transport. The client tells all engines of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict, TypeVar

import torch
from torch import Tensor

from sfpo_megatron.config.rollout import Transport
from sfpo_megatron.families.hf_files import TensorMeta

T = TypeVar("T")
WireInfo: TypeAlias = dict[str, Any]
"""What vLLM's weight-transfer API carries to engines: ours is numbers and text, ipc's has memory
handles in it."""


class Place(TypedDict):
    """An address where the trainer and the engines' workers meet."""

    address: str
    port: int
    num_workers: int
    """Number of engine workers that come."""


class Control(Protocol):
    """Messages between all trainer ranks (`mcore.control.ControlGroup`). Every method is
    collective."""

    rank: int
    size: int

    def broadcast_json(self, value: T | None = None) -> T:
        """Rank 0's JSON value on every rank; what the others pass is ignored."""

    def all_gather_json(self, value: T) -> list[T]:
        """Every rank's value (numbers, text and containers of them), by rank."""

    def sum(self, values: Tensor) -> Tensor:
        """Element sums over all ranks."""

    def max(self, values: Tensor) -> Tensor:
        """Element maxima over all ranks."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class Declared(Protocol):
    """A tensor that a source will give (vLLM's `ParamMeta`)."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


class WeightSource(Protocol):
    """Full Hugging Face tensors, in the same order on every rank (vLLM's `WeightSource`)."""

    @property
    def control(self) -> Control:
        """All trainer ranks."""

    @property
    def sharded(self) -> ShardedSource | None:
        """The same weights as the ranks' shards; None where whole tensors are all there is."""

    def metadata(self) -> Sequence[Declared]:
        """Every tensor, the same list on every rank."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Gather one tensor after another (collective); a tensor counts on the sender only."""


class ShardedSource(WeightSource, Protocol):
    """A source whose tensors lie in pieces on the ranks (`MegatronWeightSource`)."""

    leaders: list[int]
    """Rank that each tensor is gathered on."""
    shard_dims: list[int | None]
    """Dimension that each tensor is cut along into equal slices; None where it is not."""

    def metadata(self) -> list[TensorMeta]:
        """Every tensor, the same list on every rank."""

    def prepare(self) -> None:
        """Make the weights readable for `write` and `checksum`. Collective."""

    def write(self, index: int, target: Tensor) -> None:
        """Copy this rank's pieces of tensor `index` into the full tensor `target`; on CUDA the copy
        may still be under way on the current stream when this returns."""

    def checksum(self, index: int) -> int:
        """Checksum of this rank's pieces of tensor `index`; the ranks' sums add up, mod 2^64."""

    def gather(self, index: int) -> Tensor | None:
        """Full tensor `index` on its leader, None elsewhere. Collective in the leader's group."""

    def everywhere(self) -> Iterator[tuple[str, Tensor]]:
        """Every full tensor on every rank. Collective."""

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's slice of every tensor, or all of it. Collective."""


class Driver(Protocol):
    """One update as every trainer rank goes through it: `Lockstep`, `Streams` or `SourcePass`."""

    @property
    def manifest(self) -> Sequence[TensorMeta]:
        """Every tensor that is sent, in order."""

    def restart(self, *, fresh: bool, verify: bool) -> None:
        """Begin another update. `fresh`: with a new sending end; `verify`: with checksums.
        Collective."""

    def follow(self) -> None:
        """Go through everything that is left, with nothing sent. Collective."""


class SendingEnd(Protocol):
    """The trainer's side of a transport on one rank, introduced to the engines."""

    lost: bool
    """It is of no use any more: the next update needs another."""

    def send_weights(self, weight_version: str) -> int:
        """Send one refit; the bytes sent, 0 where the engines that took part did not get it all."""

    def shutdown(self) -> None:
        """Give back what it holds."""


class UpdateClient(Protocol):
    """The calls of an update to all engines at once (vLLM's `VLLMWeightSyncClient`)."""

    def init_weight_transfer_engine(self, init_info: WireInfo) -> int | None:
        """Introduce the sending end; the number of engines that know it."""

    def start_weight_update(self) -> None:
        """Begin an update."""

    def update_weights(self, update_info: WireInfo) -> None:
        """Have the engines take a bucket."""

    def begin_bucket(self, update_info: WireInfo) -> Callable[[], None]:
        """Begin `update_weights`, after the buckets before it; the returned function waits for its
        end."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update."""


class EngineClient(UpdateClient, Protocol):
    """What the sender asks of the engines (`rollout.sync_client.WeightSyncClient`)."""

    @property
    def transport(self) -> Transport:
        """`refit.transport` as the engines have it, never auto."""

    def prepare(self, version: int, *, only_stale: bool) -> None:
        """Say what the next update gives, and whether only to engines without it."""

    def needs_introduction(self) -> bool:
        """Whether some engine does not know the trainer's sending end."""

    def num_engines(self) -> int:
        """Number of engines that would take part in the update."""

    def skip_update(self, reason: str | None) -> None:
        """Go through an update without any engine. `reason`: why the trainer could not meet them;
        None where there is none to meet."""
