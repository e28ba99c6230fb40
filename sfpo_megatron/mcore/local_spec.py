"""Torch layers for packed (THD) sequences under Megatron's local layer spec.

Megatron's own torch attention refuses packing and its torch norm refuses sequence parallelism;
these two classes stand in their places. Everything else of the layer is Megatron's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import megatron.core.transformer.multi_latent_attention as mla
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor. Under sequence parallelism its gradient is a
    partial sum: Megatron's finalize_model_grads adds up what is marked `sequence_parallel`."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


_PAIRS_OF_A_CALL = 2**17
"""Pairs of a query and a key that a CPU computes in about the time of a few more calls."""


class PackedAttention(torch.nn.Module):
    """Causal attention inside each sequence of a pack.

    Scatters the pack to [S, L_max], runs one scaled_dot_product_attention, gathers back: 10 to 20
    times faster on CPU than a loop over short sequences. Where lengths are so uneven that padding
    would cost more than that saves, it runs once for each power of two of lengths: 30 times faster
    with one sequence of 2048 tokens among 50 of 40. Sequences are padded on the right, so the
    causal mask already keeps real queries from padded keys."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or config.softmax_type != "vanilla":
            raise ValueError("the torch attention has no dropout and no softmax offset; use TE")
        self.scale = softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.left = config.window_size[0] if windowed else None
        """Number of keys to the left of its own that a query sees; None for all."""

    def forward(
        self,
        query: Tensor,  # [T, heads, d]
        key: Tensor,  # [T, kv_heads, d]
        value: Tensor,  # [T, kv_heads, v]
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # [T, heads * v]
        if packed_seq_params is None:
            raise ValueError("packed (THD) input only: packed_seq_params is missing")
        width = value.shape[-1]
        # With values of another width (latent attention), torch's kernel would be the one that
        # keeps [L, L] scores.
        if width < key.shape[-1]:
            value = F.pad(value, (0, key.shape[-1] - width))
        if query.shape[1] > key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        starts = packed_seq_params.cu_seqlens_q.long()
        lengths = starts.diff()
        sequence = torch.repeat_interleave(lengths)  # [T] which sequence a token is in
        place = torch.arange(query.shape[0], device=query.device) - starts[sequence]
        padded_pairs = lengths.numel() * packed_seq_params.max_seqlen_q**2
        if padded_pairs <= 2 * int(lengths.square().sum()) + _PAIRS_OF_A_CALL:
            return self._attend(query, key, value, sequence, place)[..., :width].flatten(1)
        kind = lengths.double().log2().ceil()[sequence]  # [T]
        parts = [torch.nonzero(kind == each)[:, 0] for each in kind.unique()]
        found = [
            self._attend(*(x[part] for x in (query, key, value, sequence, place))) for part in parts
        ]
        return torch.cat(found)[torch.argsort(torch.cat(parts))][..., :width].flatten(1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, place: Tensor
    ) -> Tensor:
        """Attend in whole sequences, padded to the longest: [T, heads, d] each, the result too."""
        rows = torch.unique_consecutive(sequence, return_inverse=True)[1]
        num, longest = int(rows[-1]) + 1, int(place.max()) + 1
        index = rows * longest + place

        def padded(x: Tensor) -> Tensor:  # [T, h, d] -> [S, h, L_max, d]
            out = x.new_zeros(num * longest, *x.shape[1:]).index_copy(0, index, x)
            return out.view(num, longest, *x.shape[1:]).transpose(1, 2)

        mask = None
        if self.left is not None and longest > self.left + 1:
            mask = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
            mask = mask.triu(-self.left)
        out = F.scaled_dot_product_attention(
            padded(query),
            padded(key),
            padded(value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )
        return out.transpose(1, 2).flatten(0, 1)[index]


def local_block_spec(
    config: TransformerConfig, layers: Iterable[int]
) -> TransformerBlockSubmodules:
    """Megatron's local decoder spec with the classes above, for `layers`, numbered from 0."""
    pattern, num_experts = config.moe_layer_freq, config.num_moe_experts
    dense = _layer_spec(config, num_experts=None)
    with_experts = _layer_spec(config, num_experts=num_experts) if num_experts else dense
    specs = [
        with_experts if not isinstance(pattern, list) or pattern[layer] else dense
        for layer in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    latent = config.multi_latent_attention
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            normalization="RMSNorm",
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=latent,
        )
    )
    layer = spec.submodules
    if latent:
        _use_latent_attention(layer)
    if num_experts:
        # Upstream files this norm under `mlp.linear_fc1`, which a MoE layer does not have; its TE
        # spec keeps it as `pre_mlp_layernorm`, and so do we.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm and not latent:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _use_latent_attention(layer: TransformerLayerSubmodules) -> None:
    """Let every rank make the short vectors whole, as under TransformerEngine.

    Upstream's local spec cuts their linears over tensor-parallel ranks, and the gather that follows
    does not add up the ranks' gradients of the rotated part of the key, which all heads share."""
    if not isinstance(mla.TELinear, type):
        # No TransformerEngine. 0.16.1 takes it to be there all the same, and a mock for its class;
        # 0.19 knows better, but then has no plain linear either.
        mla.HAVE_TE, mla.Linear = False, Linear
    attention = layer.self_attention.submodules
    attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    attention.q_layernorm = attention.kv_layernorm = RMSNorm
    layer.sharded_state_dict_keys_map = {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
