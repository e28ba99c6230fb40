"""What is chosen where TransformerEngine's kernels run: pure functions of what was found and asked.

Each says which line of a dependency it answers. A CPU without TransformerEngine keeps what it has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.mcore.capabilities import Capabilities

_SEQLEN_MULTIPLE = 512
_GEMM_ROWS = 128


def seqlen_bound(longest: int, num_tokens: int, capabilities: Capabilities) -> int:
    """A bound of the lengths of a pack's sequences, the same for many packs of `num_tokens`.

    TransformerEngine selects an attention backend again where this, the pack's tokens or its number
    of sequences differs from the last call's (`DotProductAttention.forward` compares
    `AttentionParams`, dot_product_attention.py), and Megatron keeps 32 tables of rotary embeddings,
    one for each bound (`RotaryEmbedding.forward`, rotary_pos_embedding.py). A larger bound costs
    nothing: sequences end where cu_seqlens says. But never `num_tokens` itself: a table of that
    length is taken for one of the whole pack, whose second sequence would begin where the first
    ends (`_apply_rotary_pos_emb_thd`, rope_utils.py, from 0.19 on).
    """
    if not (capabilities.cuda and capabilities.layers == "te"):
        return longest
    bound = -(-longest // _SEQLEN_MULTIPLE) * _SEQLEN_MULTIPLE
    return bound + _SEQLEN_MULTIPLE if bound == num_tokens else bound


def pack_multiple(capabilities: Capabilities) -> int:
    """What each rank's part of a pack is rounded up to, so that few sizes come up.

    A Hopper GEMM works on tiles of 128 rows and fills the last one anyway; each size that is new
    costs a selection (`seqlen_bound`), cuBLAS heuristics and blocks of torch's allocator.
    """
    return _GEMM_ROWS if capabilities.cuda else 1


def groups_experts(capabilities: Capabilities) -> bool:
    """Whether experts are multiplied in one grouped GEMM, and tokens sorted for them by one kernel.

    Megatron's own sorting indexes, and has the counts that it sorts by copied to the host in each
    layer (`_maybe_dtoh_and_synchronize`, moe/token_dispatcher.py); the kernel takes them on the
    device.
    """
    return capabilities.cuda and capabilities.layers == "te"


def fuses_weight_gradients(config: RunConfig, capabilities: Capabilities) -> bool:
    """Whether layers add their weight gradients to the fp32 main gradients inside the GEMM.

    `megatron.transformer.gradient_accumulation_fusion: false` says no. True is Megatron's own
    switch, for which its `ColumnParallelLinear` wants Apex (tensor_parallel/layers.py).
    """
    wanted = config.megatron.transformer.get("gradient_accumulation_fusion", True)
    return bool(wanted) and capabilities.layers == "te"


def fuse_weight_gradients(modules: Iterable[torch.nn.Module]) -> None:
    """Let TransformerEngine's layers among `modules` accumulate in fp32, without a bf16 gradient.

    They read `fuse_wgrad_accumulation` in each forward (module/linear.py, layernorm_linear.py,
    grouped_linear.py). TransformerConfig has one switch for them and the output layer, which is
    Megatron's own class and keeps its gradient.
    """
    for module in modules:
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
