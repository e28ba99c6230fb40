"""The name table of a model: every Megatron tensor in order, its Hugging Face parts, their sizes.

No torch: the planner counts from it.
"""

from __future__ import annotations

from sfpo_megatron.families.known import FAMILIES
from sfpo_megatron.families.rule import Rule, Where
from sfpo_megatron.families.shape import ModelShape

EMBEDDING = Rule(
    megatron="embedding.word_embeddings.weight",
    hf=("model.embed_tokens.weight",),
    kind="vocab",
    tp_dim=0,
)
FINAL_NORM = Rule(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",))
OUTPUT = Rule(megatron="output_layer.weight", hf=("lm_head.weight",), kind="vocab", tp_dim=0)


def rules_of(shape: ModelShape) -> list[Rule]:
    """All rules, in Hugging Face order. With tied embeddings there is no output rule: the last
    pipeline stage's copy of the embedding is loaded through `EMBEDDING` (see `rule_by_name`)."""
    rules = [EMBEDDING]
    for layer in range(shape.num_layers):
        of_layer = layer_rules(shape, layer)
        of_expert = [rule for rule in of_layer if rule.expert]
        rules.extend(rule.at(layer=layer) for rule in of_layer if not rule.expert)
        for expert in range(shape.moe.num_experts if of_expert and shape.moe else 0):
            rules.extend(rule.at(layer=layer, expert=expert) for rule in of_expert)
    rules.append(FINAL_NORM)
    if not shape.tied_embeddings:
        rules.append(OUTPUT)
    return rules


def layer_rules(shape: ModelShape, layer: int) -> tuple[Rule, ...]:
    """The rules of one layer; its index and those of its experts are left open."""
    latent = shape.mla is not None and shape.mla.query_rank is not None
    places: tuple[Where, Where] = (
        "dense" if layer < shape.num_dense_layers else "experts",
        "latent_query" if latent else "whole_query",
    )
    rules = FAMILIES[shape.family].layer
    return tuple(rule for rule in rules if rule.only is None or rule.only in places)


def rule_by_name(shape: ModelShape) -> dict[str, Rule]:
    """Megatron name -> rule; with tied embeddings `output_layer.weight` is the embedding."""
    table = {rule.megatron: rule for rule in rules_of(shape)}
    if shape.tied_embeddings:
        table[OUTPUT.megatron] = EMBEDDING
    return table


def hf_shapes(rule: Rule, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of the rule's Hugging Face parts, from the model's sizes alone."""
    hidden, d, moe = shape.hidden_size, shape.head_dim, shape.moe
    q, kv = shape.num_heads * d, shape.num_kv_heads * d
    name = rule.megatron
    ffn = shape.ffn_size
    if moe and (rule.expert or ".shared_experts." in name):
        ffn = moe.ffn_size if rule.expert else moe.shared_ffn_size
    if rule.kind == "vocab":
        return [(shape.vocab_size, hidden)]
    if rule.kind == "gate_up":
        return [(ffn, hidden)] * 2
    if rule.kind == "qkv":
        rest = (hidden,) if name.endswith("weight") else ()
        return [(q, *rest), (kv, *rest), (kv, *rest)]
    *_, module, kind = name.split(".")
    latent = shape.mla.matrices(hidden, shape.num_heads) if shape.mla else {}
    if module in latent:  # or the norm in front of it
        return [latent[module] if kind == "weight" else latent[module][1:]]
    if module == "linear_proj":
        return [(hidden, q)]
    if module == "linear_fc2":
        return [(hidden, ffn)]
    if module in ("q_layernorm", "k_layernorm"):
        return [(d,)]
    if module == "router" and moe:
        return [(moe.num_experts, hidden) if kind == "weight" else (moe.num_experts,)]
    return [(hidden,)]
