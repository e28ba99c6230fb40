"""The mixture-of-experts MLP of a layer: its norm, the router, and every expert.

An expert's name carries its GLOBAL index: `mlp.experts.experts.{expert}.linear_fc1.weight`, as
Megatron's distributed checkpoints name it (with `singleton_local_shards`; without, the index is an
axis of `mlp.experts.experts.linear_fc1.weight`), whichever of Megatron's classes holds it. In
memory a rank counts its own experts from 0 (`local_experts.{i}.linear_fc1` in SequentialMLP,
`linear_fc1.weight{i}` in TEGroupedMLP); `mcore.model.named_params` translates.
"""

from sfpo_megatron.families.rule import Rule

_M = "decoder.layers.{layer}."
_E = _M + "mlp.experts.experts.{expert}."
_H = "model.layers.{layer}."


SHARED = (
    Rule(
        megatron=_M + "mlp.shared_experts.linear_fc1.weight",
        hf=tuple(f"{_H}mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up")),
        kind="gate_up",
        tp_dim=0,
    ),
    Rule(
        megatron=_M + "mlp.shared_experts.linear_fc2.weight",
        hf=(_H + "mlp.shared_experts.down_proj.weight",),
        tp_dim=1,
    ),
)
"""The MLP that every token passes, under DeepSeek's names; cut as the attention is."""

CHOICE_BIAS = Rule(
    megatron=_M + "mlp.router.expert_bias",
    hf=(_H + "mlp.gate.e_score_correction_bias",),
    frozen=True,
)
"""What is added to the scores by which experts are chosen (not to those they are weighed by)."""


def moe_rules(*, block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """`block`: the Hugging Face module of router and experts; the rest: an expert's projections."""
    expert = f"{_H}{block}.experts.{{expert}}."
    return (
        # Not fused into linear_fc1, as a dense layer's is: the router reads the normed input too.
        Rule(
            megatron=_M + "pre_mlp_layernorm.weight",
            hf=(_H + "post_attention_layernorm.weight",),
        ),
        Rule(megatron=_M + "mlp.router.weight", hf=(f"{_H}{block}.gate.weight",)),
        Rule(
            megatron=_E + "linear_fc1.weight",
            hf=(f"{expert}{gate}.weight", f"{expert}{up}.weight"),
            kind="gate_up",
            tp_dim=0,
            expert=True,
        ),
        Rule(
            megatron=_E + "linear_fc2.weight",
            hf=(f"{expert}{down}.weight",),
            tp_dim=1,
            expert=True,
        ),
    )
