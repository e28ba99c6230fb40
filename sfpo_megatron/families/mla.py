"""Multi-head latent attention and DeepSeek-V3's router, as config.json describes them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sfpo_megatron.families.hf_config import Finding, HFConfig
from sfpo_megatron.families.rope import rope_settings

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(kw_only=True, frozen=True, slots=True)
class MLAShape:
    """Multi-head latent attention: q, k and v are made from short vectors."""

    query_rank: int | None
    """None: queries are made from the hidden state."""
    kv_rank: int
    nope_dim: int
    """Size of the part of a head's query and key that is not rotated."""
    rope_dim: int
    """Size of the part that is; a key has it in common with those of all heads."""
    value_dim: int

    @property
    def key_dim(self) -> int:
        """Size of a head's query and key."""
        return self.nope_dim + self.rope_dim

    def matrices(self, hidden: int, heads: int) -> dict[str, tuple[int, int]]:
        """Megatron's name -> [out, in] of every projection, in Hugging Face order."""
        if self.query_rank is None:
            query = {"linear_q_proj": (heads * self.key_dim, hidden)}
        else:
            query = {
                "linear_q_down_proj": (self.query_rank, hidden),
                "linear_q_up_proj": (heads * self.key_dim, self.query_rank),
            }
        return {
            **query,
            "linear_kv_down_proj": (self.kv_rank + self.rope_dim, hidden),
            "linear_kv_up_proj": (heads * (self.nope_dim + self.value_dim), self.kv_rank),
            "linear_proj": (hidden, heads * self.value_dim),
        }


def mla_shape(config: HFConfig) -> MLAShape:
    """The sizes in a config.json that `refused_mla` finds nothing in."""
    kv, nope, rope, value = (int(config[name]) for name in _SIZES)
    query = config.get("q_lora_rank")
    return MLAShape(
        query_rank=None if query is None else int(query),
        kv_rank=kv,
        nope_dim=nope,
        rope_dim=rope,
        value_dim=value,
    )


def refused_mla(config: HFConfig) -> Iterator[Finding]:
    """(found, expected[, what to do]) of what a DeepSeek-V3 asks for and Megatron does not do."""
    fix = "restore the model's config.json"
    rotated, head_dim = config["qk_rope_head_dim"], config["head_dim"]
    if head_dim not in (None, rotated):  # transformers would turn that many dimensions
        found = f"head_dim {head_dim} with qk_rope_head_dim {rotated}"
        yield found, "the same, as transformers saves it, or no head_dim", fix
    if rotated % 2:
        yield f"qk_rope_head_dim {rotated}", "an even number: rotary embeddings turn pairs", fix
    if not config.get("rope_interleave"):
        yield "rope_interleave false", "true, the order that Megatron rotates in"
    kind = rope_settings(config)["rope_type"]
    if kind not in ("default", "yarn"):
        yield f"rope type {kind} with multi-head latent attention", "default or yarn"
    if config.get("tie_word_embeddings"):  # vLLM's class does not tie them: its head stays unset
        yield "tie_word_embeddings true", "false", "save the model with a head of its own"
    if config.get("moe_layer_freq", 1) != 1:
        yield f"moe_layer_freq {config['moe_layer_freq']}", "experts in every layer after the first"
    if config["first_k_dense_replace"] >= config["num_hidden_layers"]:
        yield f"first_k_dense_replace {config['first_k_dense_replace']}", "fewer than all layers"
    for name, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(name) != only:  # where they are not said, vLLM takes others
            fix = "add it to a DeepSeek-V3's config.json, or choose another model"
            yield f"{name} {config.get(name)}", f"{only}, said", fix
    yield from _refused_choice(config)


def _refused_choice(config: HFConfig) -> Iterator[Finding]:
    """The same for the choice of experts: megatron/core/transformer/moe/moe_utils.py,
    group_limited_topk and topk_routing_with_score_function."""
    experts, chosen = int(config["n_routed_experts"]), int(config["num_experts_per_tok"])
    if chosen > 1 and not config.get("norm_topk_prob"):
        yield "norm_topk_prob false", "true: Megatron divides sigmoid scores by their sum"
    groups, limit = int(config["n_group"]), int(config["topk_group"])
    if experts % groups or limit > groups or chosen > limit * (experts // groups):
        found = f"n_group {groups}, topk_group {limit} for {chosen} of {experts} experts"
        yield found, "groups of equal size, enough of them", "restore the model's config.json"
    if limit < groups and chosen // limit != 2:
        # The model sums the best two of a group; Megatron the best num_experts_per_tok/topk_group.
        yield (
            f"num_experts_per_tok {chosen} with topk_group {limit}",
            "two for each group: Megatron ranks groups by so many of their experts, the model by 2",
        )
