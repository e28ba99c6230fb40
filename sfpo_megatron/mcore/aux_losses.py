"""Router auxiliary losses (load balancing, z-loss) as a mean over tokens, whatever the split.

They are Megatron's own (`megatron.transformer`: moe_router_load_balancing_type, moe_aux_loss_coeff,
moe_z_loss_coeff) and enter the backward pass beside the token loss. Left alone, every pack of every
data-parallel rank would weigh the same, however few tokens it has, and padding would count. Here
the gradient is that of

    token loss + sum over packs of (T_pack / T) * aux(pack)

with T the tokens of the minibatch on all data-parallel ranks, padding left out. The
z-loss is a mean over a pack's tokens, so that is the mean over all tokens. A load-balancing loss
multiplies two means of a pack (f_i * P_i): which tokens share a pack matters to it, how many packs
there are does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from sfpo_megatron.types import Microbatch, Minibatch


class AuxLosses:
    """Weighs the auxiliary losses; `grad_scale` has to be the TransformerConfig's
    `grad_scale_func`.

    A router multiplies its loss by the tokens of the pack (what `calculate_per_token_loss` asks of
    it, whether the config has it on or not), Megatron by grad_scale(1); then, as the token loss, it
    is divided by microbatches x data-parallel size, or by the token count.
    """

    def __init__(self, routers: list[TopKRouter], scale_loss: Callable[[Tensor], Tensor]) -> None:
        for router in routers:
            router.calculate_per_token_loss = True
        config = routers[0].config
        self._sequence_parallel = config.sequence_parallel
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        # From 0.19 on a router multiplies by the size of its group, too.
        at_least_0_19 = [int(n) for n in megatron.core.__version__.split(".")[:2]] >= [0, 19]
        self._counts_of_token = ranks if at_least_0_19 else 1
        if config.moe_z_loss_coeff:
            # Under sequence parallelism a router counts the whole pack for its load-balancing loss
            # (`_reduce` adds up in place), but for the z-loss its own part: make that the same.
            config.moe_z_loss_coeff *= ranks
        self._scale_loss = scale_loss
        self._weight = 1.0

    @classmethod
    def of(
        cls, chunks: Sequence[torch.nn.Module], scale_loss: Callable[[Tensor], Tensor]
    ) -> AuxLosses | None:
        """The losses of `chunks`; None if no router there has one. ValueError under context
        parallelism."""
        routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
        if not any(r.is_aux_loss_enabled() or r.config.moe_z_loss_coeff for r in routers):
            return None
        if (size := routers[0].config.context_parallel_size) > 1:
            # `check` says so too (config/rules/context_parallel.py), of what the config names.
            raise ValueError(
                f"parallel.context: found {size} with an auxiliary loss of routers, expected 1: "
                "the padding inside of sequences would count; set "
                "megatron.transformer.moe_router_load_balancing_type: none and moe_z_loss_coeff: 0"
            )
        return cls(routers, scale_loss)

    def grad_scale(self, loss: Tensor) -> Tensor:
        """Megatron's `grad_scale_func`; it gets the token loss, and 1 for the auxiliary losses."""
        return self._scale_loss(loss) * self._weight

    def weigh(self, minibatch: Minibatch, divisor: float) -> float:
        """Set the weight for `minibatch`, whose gradients Megatron will have divided by `divisor`,
        and return it: the token loss goes through `grad_scale` too, and is divided by it before."""
        self._weight = divisor / (minibatch.global_tokens * self._counts_of_token)
        return self._weight

    def padding_mask(self, microbatch: Microbatch, *, pre_process: bool) -> Tensor:
        """Mask [1, T], True at padding; an empty pack keeps one token, or its mean would be 0/0."""
        size = microbatch.token_ids.numel()
        places = torch.arange(size, device=microbatch.token_ids.device)
        mask = (places >= max(microbatch.num_tokens, 1))[None]
        if self._sequence_parallel and not pre_process:
            # GPTModel cuts it over tensor-parallel ranks on the first pipeline stage only.
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            mask = mask.chunk(ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
        return mask
