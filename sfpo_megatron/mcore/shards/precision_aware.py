"""`use_precision_aware_optimizer`: the main params that TransformerEngine's FusedAdam holds.

The DistributedOptimizer hands its bf16 shards (views of the param buffer) to FusedAdam. Of each,
`state["master_param"]` is the fp32 main param, or (`store_param_remainders`, the default) only its
low 16 bits as an int16, the bf16 param being the high ones, rounded half up:

    main bits = (bf16 bits - (remainder < 0)) << 16 | remainder                        `join`
    remainder = low half of main bits;  bf16 bits = high half + (remainder < 0)        `split`

Not by `.to(torch.bfloat16)`, which rounds half to even: on ties the pair would be another number.
Before the first optimizer step there is no state and the main param is the bf16 value.

Private names of Megatron-Core and TransformerEngine used here are held by
tests/dist/test_private_names.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sfpo_megatron.mcore.shards.main_params import ShardedMainParams

STAGING_NUMEL = 1 << 24
"""Elements rebuilt at a time: one buffer of at most 64 MiB."""


class PrecisionAwareMainParams(ShardedMainParams):
    """DistributedOptimizer whose FusedAdam holds the main params, of bf16 or fp32 model params.

    Main params that have no fp32 storage are rebuilt in one staging buffer, piece by piece, and
    written back if the consumer edited the piece; torch's version counter tells (an edit through
    `.data` would not show). The pieces are the same at each call.

    ValueError for a TransformerEngine older than 2.1.
    """

    @classmethod
    def fits(cls, optimizer: MegatronOptimizer) -> bool:
        """Not with an FP8 recipe other than delayed: Megatron holds the main params then."""
        config, distributed = optimizer.config, isinstance(optimizer, DistributedOptimizer)
        return distributed and config.use_precision_aware_optimizer_no_fp8_or_ds_fp8

    def __init__(
        self, optimizer: DistributedOptimizer, *, staging_numel: int = STAGING_NUMEL
    ) -> None:
        super().__init__(optimizer)
        self._staging_numel = staging_numel
        self._staging: Tensor | None = None
        if not hasattr(self._adam, "store_param_remainders"):
            raise ValueError(
                "megatron.optimizer.use_precision_aware_optimizer: found "
                f"{type(self._adam).__module__}.{type(self._adam).__name__} without "
                "store_param_remainders, expected FusedAdam of TransformerEngine 2.1 or newer"
            )

    @property
    def _adam(self) -> Any:
        return self._optimizer.optimizer

    def _params(self) -> Iterator[Tensor]:
        for group in self._adam.param_groups:
            yield from group["params"]

    def tensors(self) -> Iterator[Tensor]:
        for param in self._params():
            if param.dtype == torch.float32:
                yield param  # stepped in place: "master_param" beside it is a copy that goes stale
                continue
            for start in range(0, param.numel(), self._staging_numel):
                yield from self._piece(param, slice(start, start + self._staging_numel))

    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        owner_of = self._owner_of()
        for param in self._params():
            whole = param.dtype == torch.float32
            for _ in range(0, param.numel(), param.numel() if whole else self._staging_numel):
                yield owner_of[id(param)]

    def copy_to_model(self) -> None:
        """What is stored as remainders is already there: `split` writes the bf16 param too."""
        for param in self._params():
            main = self._adam.state.get(param, {}).get("master_param")
            if param.dtype == torch.bfloat16 and main is not None and main.dtype == torch.float32:
                param.data.copy_(main)  # half to even, as FusedAdam's kernel rounds here

    def state_of(self, model_param: Tensor) -> dict[str, Tensor]:
        """Upstream's getter would return int16 remainders, which are saved as if they were the main
        param, and of fp32 params the copy in FusedAdam's state, which is never stepped."""
        adam, shard = self._adam, self._stepped(model_param)
        moments = {name: adam.get_unscaled_state(shard, name) for name in self._moments()}
        master = adam.state[shard]["master_param"]
        if shard.dtype == torch.float32:
            return {"param": shard, **moments}
        if master.dtype == torch.int16:
            main = torch.empty(shard.shape, dtype=torch.float32, device=shard.device)
            join(shard, master, main)
            return {"param": main, **moments}
        return {"param": adam.get_unscaled_state(shard, "master_param"), **moments}

    @torch.no_grad()
    def put_state(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        adam, shard = self._adam, self._stepped(model_param)
        for name in self._moments():
            adam.set_scaled_state(shard, name, tensors[name].to(shard.device))
        main = tensors["param"].to(shard.device).contiguous()
        master = adam.state[shard]["master_param"]
        if shard.dtype == torch.bfloat16 and master.dtype == torch.int16:
            split(main, shard.data, master)
            return
        if shard.dtype == torch.float32:
            shard.copy_(main)
        adam.set_scaled_state(shard, "master_param", main)

    def _piece(self, param: Tensor, piece: slice) -> Iterator[Tensor]:
        """The fp32 main param of a piece of a bf16 param: one tensor, editable until resumed."""
        main = self._adam.state.get(param, {}).get("master_param")
        if main is not None and main.dtype == torch.float32:
            yield main[piece]
            return
        staged = self._staging_buffer(param)[: param[piece].numel()]
        with torch.no_grad():
            if main is None:
                staged.copy_(param[piece])
            else:
                join(param[piece], main[piece], staged)
        version = staged._version
        try:
            yield staged
        finally:  # also where the consumer stops at this one
            if staged._version != version:
                self._write_back(param, piece, staged)

    @torch.no_grad()
    def _write_back(self, param: Tensor, piece: slice, staged: Tensor) -> None:
        state = self._adam.state
        if "master_param" not in state.get(param, {}):
            # Nor may the state be made sooner: Megatron would not reload fp32 main params from
            # params that were loaded in between (_copy_model_params_to_main_params returns early).
            self._adam.initialize_state(param, self._adam.store_param_remainders)
        main = state[param]["master_param"]
        if main.dtype == torch.float32:
            main[piece].copy_(staged)
        else:
            split(staged, param.data[piece], main[piece])

    def _staging_buffer(self, param: Tensor) -> Tensor:
        if self._staging is None:
            largest = max(p.numel() for p in self._params() if p.dtype == torch.bfloat16)
            self._staging = torch.empty(
                min(largest, self._staging_numel), dtype=torch.float32, device=param.device
            )
        return self._staging


def _halves(main: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) 16 bits of fp32 `main` [n], as int16 views (little-endian, as CUDA devices)."""
    halves = main.view(torch.int16).view(-1, 2)
    return halves[:, 0], halves[:, 1]


@torch.no_grad()
def join(bf16: Tensor, remainder: Tensor, out: Tensor) -> None:
    """out [n] fp32 = the main param of `bf16` [n] and `remainder` [n] int16."""
    low, high = _halves(out)
    low.copy_(remainder)
    torch.add(bf16.view(torch.int16), remainder >> 15, out=high)  # -1 where it was rounded up


@torch.no_grad()
def split(main: Tensor, bf16: Tensor, remainder: Tensor) -> None:
    """Inverse of `join`: `bf16` and `remainder` are written."""
    low, high = _halves(main)
    remainder.copy_(low)
    torch.sub(high, remainder >> 15, out=bf16.view(torch.int16))
