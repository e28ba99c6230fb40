"""The DistributedOptimizer's main params and moments, gathered whole on data-parallel rank 0.

In the place of Megatron's get_parameter_state_dp_zero, when a checkpoint is saved. Upstream joins
the buckets without the padding between them and then cuts params out at their padded places: of
a buffer with several buckets (overlap_grad_reduce, above 40M params) all but the first come out
shifted (0.16.1; its `TODO ... issue #504`). It also makes five copies of the state on the way,
while the train step waits. Here a param is copied once on one rank, and twice over several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Pieces:
    """One kind of state of a buffer, a tensor of its own for each param: what Megatron cuts out of
    a flat one, asked for by the same slices. Without tensors: empty ones, to load into."""

    def __init__(self, tensors: dict[int, Tensor] | None) -> None:
        self._tensors = tensors

    def __getitem__(self, place: slice) -> Tensor:
        numel = place.stop - place.start
        if self._tensors is None:
            return torch.empty(numel, dtype=torch.float32)
        tensor = self._tensors[place.start]
        assert tensor.numel() == numel
        return tensor


@torch.no_grad()
def gathered_states(
    member: Any,
    state_of: Callable[[Tensor], dict[str, Tensor]],
    keys: Sequence[str],
    *,
    empty_data: bool = False,
    use_gloo_comm: bool = True,
    return_on_all_ranks: bool = False,
) -> dict[Any, Any] | None:
    """What get_parameter_state_dp_zero gathers, of `state_of(model_param)`, which has `keys` for
    what this rank has of a param. None but on data-parallel rank 0, unless `empty_data`. Collective
    over the data-parallel ranks."""
    group = member.data_parallel_group_gloo or member.data_parallel_group
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, (buffer, ranges) in enumerate(zip(member.buffers, member.gbuf_ranges, strict=True)):
        ((dtype, buckets),) = ranges.items()
        if empty_data:
            found: dict[str, dict[int, Tensor] | None] = dict.fromkeys(keys)
        else:
            found = {key: {} for key in keys}
            for number, bucket in enumerate(buckets):
                _gather_bucket(state_of, buffer, number, bucket["param_map"], group, found)
        state[index] = {dtype: {key: Pieces(tensors) for key, tensors in found.items()}}
    return state if empty_data or group.rank() == 0 else None


def _gather_bucket(
    state_of: Callable[[Tensor], dict[str, Tensor]],
    buffer: Any,
    number: int,
    mine: dict[Tensor, Any],
    group: dist.ProcessGroup,
    found: dict[str, Any],
) -> None:
    """Add the params of one bucket to `found`, by where they start in the buffer."""
    bucket = buffer.buckets[number]
    places = {
        param: (start, end)
        for param, (start, end, of) in buffer.param_index_map.items()
        if of == number
    }
    if group.size() == 1:
        for param, (start, _) in places.items():
            for key, value in state_of(param).items():
                copy = torch.empty(value.numel(), dtype=torch.float32)
                found[key][start] = copy.copy_(value.detach().view(-1))
        return
    states = {param: state_of(param) for param in mine}
    length = bucket.grad_data.numel() // group.size()
    for key in found:
        local = torch.empty(length, dtype=torch.float32)
        for param, of in mine.items():
            local[of["gbuf_local"].start : of["gbuf_local"].end].copy_(states[param][key])
        is_main = group.rank() == 0
        parts = [torch.empty_like(local) for _ in range(group.size())] if is_main else None
        dist.gather(local, parts, dist.get_global_rank(group, 0), group)
        for param, (start, end) in places.items() if parts is not None else ():
            assert parts is not None
            first, last = start - bucket.offset, end - bucket.offset
            cut = [
                part[max(0, first - rank * length) : max(0, last - rank * length)]
                for rank, part in enumerate(parts)
            ]
            found[key][start] = torch.cat(cut)
            assert found[key][start].numel() == param.numel()
