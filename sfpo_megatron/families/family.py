"""A `Family`: what tells one kind of decoder from the others, as one record. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.families.mla import MLAShape
from sfpo_megatron.families.moe import MoEShape
from sfpo_megatron.families.rule import Rule
from sfpo_megatron.families.windows import no_layer

DEFAULTS: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": None,
    "eos_token_id": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": None,
    "use_cache": True,
}
"""What a key means that config.json does not have, in most architectures: those of transformers'
LlamaConfig. None: worked out from other keys, or nothing."""
_QK_NORMS = ("q_layernorm.weight", "k_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")


def _nothing(config: HFConfig) -> Iterator[Finding]:
    yield from ()


@dataclass(kw_only=True, frozen=True, slots=True)
class Family:
    """A kind of decoder. Biases and norms of queries and keys are there if a rule names them."""

    name: str
    architectures: tuple[str, ...]
    """Values of `architectures[0]` in a config.json."""
    layer: tuple[Rule, ...]
    """Every tensor of a layer, in Hugging Face order."""
    windowed: Callable[[HFConfig], tuple[bool, ...]] = no_layer
    """Layers with sliding-window attention (windows.py)."""
    moe: Callable[[HFConfig], MoEShape] | None = None
    """Reads the sizes of the experts; None: the MLP is dense."""
    mla: Callable[[HFConfig], MLAShape] | None = None
    """Reads the sizes of multi-head latent attention; None: attention is plain."""
    mtp_layers: str | None = None
    """The key of the number of multi-token prediction layers, which are left out."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Over `DEFAULTS`, where the family's own differ: those of its configuration class in
    transformers, which a test holds them to."""
    nullable: frozenset[str] = frozenset()
    """Keys that may be null, beside those that may be in every family."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Another name of a key -> the one that is read here."""
    refused: Callable[[HFConfig], Iterator[Finding]] = _nothing
    """(found, expected[, what to do]) of what this family may ask for and nobody here does."""

    @property
    def qkv_bias(self) -> bool:
        """Queries, keys and values have biases."""
        return any(rule.megatron.endswith("linear_qkv.bias") for rule in self.layer)

    @property
    def qk_norm(self) -> bool:
        """Each head's query and key are normed, or the vectors that they are made from."""
        return any(rule.megatron.endswith(_QK_NORMS) for rule in self.layer)
