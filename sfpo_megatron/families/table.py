"""The name table of a model: every Megatron tensor in order, with its Hugging Face parts."""

from __future__ import annotations

from sfpo_megatron.families import deepseek_v3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from sfpo_megatron.families.rules import Rule
from sfpo_megatron.families.shape import ModelShape

_LAYER_RULES = {
    "llama": llama.LAYER,
    "mistral": mistral.LAYER,
    "mixtral": mixtral.LAYER,
    "qwen2": qwen2.LAYER,
    "qwen3": qwen3.LAYER,
    "qwen3_moe": qwen3_moe.LAYER,
}

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
        of_layer = _layer_rules(shape, layer)
        of_expert = [rule for rule in of_layer if rule.expert]
        rules.extend(rule.at(layer=layer) for rule in of_layer if not rule.expert)
        for expert in range(shape.moe.num_experts if of_expert and shape.moe else 0):
            rules.extend(rule.at(layer=layer, expert=expert) for rule in of_expert)
    rules.append(FINAL_NORM)
    if not shape.tied_embeddings:
        rules.append(OUTPUT)
    return rules


def _layer_rules(shape: ModelShape, layer: int) -> tuple[Rule, ...]:
    if shape.family == "deepseek_v3":  # its layers differ
        return deepseek_v3.layer(shape, layer)
    return _LAYER_RULES[shape.family]


def rule_by_name(shape: ModelShape) -> dict[str, Rule]:
    """Megatron name -> rule; with tied embeddings `output_layer.weight` is the embedding."""
    table = {rule.megatron: rule for rule in rules_of(shape)}
    if shape.tied_embeddings:
        table[OUTPUT.megatron] = EMBEDDING
    return table
