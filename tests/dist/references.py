"""What every case compares with: tiny random Hugging Face models, their logits, rollout batches.

Made in the pytest process, by transformers alone, where the CPU bridge of mcore is not installed.
Shapes that bite: 4 layers, GQA 6:2, head_dim 32 (hidden / heads is 16), 101 tokens, ragged lengths,
random norm weights and biases (at their initial 1 and 0 a lost one would not show).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import exact_gradients
import torch
from safetensors.torch import load_file, save_file

MODELS = [f"{kind}_{tie}" for kind in ("qwen2", "qwen3", "llama") for tie in ("tied", "untied")]
MOE_MODELS = ["qwen3moe_untied", "mixtral_tied", "qwen3moeraw_tied"]
"""Mixtures of experts: 2 of 4 for each token; `raw`: their probabilities are not normalized."""
_core = find_spec("megatron.core")
PLAIN_QUERIES = not (
    _core and _core.origin and Path(_core.origin).with_name("transformer").joinpath(
        "mla_qk_norm_config.py"
    ).exists()
)  # fmt: skip
"""From 0.19 on Megatron puts a norm in front of queries that are not latent."""
LATENT_MODELS = ["deepseek_untied"] + ["deepseekq_untied"] * PLAIN_QUERIES
"""Multi-head latent attention, a dense first layer, sigmoid routing with biases. The first: latent
queries, stretched rotary embeddings, the best 2 of 4 groups; the second has none of these."""

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_key_value_heads": 6,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,  # the rotated part, to transformers
    "v_head_dim": 20,  # not the width of queries and keys
    "num_mtp_layers": 0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_QWEN3_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,  # not the dense size
}
MORE_MODELS = [
    "mistral_untied",
    "qwen2win_tied",
    "llamarope_tied",
    "llamalinear_untied",
    "qwen3yarn_tied",
]
"""A window of 5 tokens, in all layers or in the last two; stretched rotary embeddings, and one head
of keys and values: fewer than tensor-parallel ranks."""
ALL_MODELS = MODELS + MOE_MODELS + MORE_MODELS + LATENT_MODELS
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {}),
    "qwen3moe": ("Qwen3MoeConfig", _QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3moeraw": ("Qwen3MoeConfig", _QWEN3_MOE | {"norm_topk_prob": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "deepseek": (
        "DeepseekV3Config",
        _DEEPSEEK | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseekq": (
        "DeepseekV3Config",
        _DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "qwen2win": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "llamarope": (
        "LlamaConfig",
        {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,  # the sequences are longer
            },
        },
    ),
    "qwen3yarn": (
        "Qwen3Config",
        {"rope_parameters": _YARN},
    ),
    "llamalinear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
}
SEQUENCES = (7, 20, 13)
"""Lengths of the three sequences whose logits are compared."""
VOCAB_SIZE = 101
NUM_STEPS, GROUP_SIZE, NUM_PROMPTS = 3, 4, 4
K, ALPHA, MINIBATCHES, LR, WEIGHT_DECAY, CLIP_GRAD = 3, 0.8, 2, 1e-4, 0.05, 1.0
EPS = 1e-8
"""Adam's default."""
ENTROPY_COEF = 0.01
"""Leaves a gradient where every token is clipped: these models learn a batch in two passes."""
TRAINED = ("qwen2_tied", "qwen3_untied")
"""Models that the training cases use: tied embeddings and biases; q/k norms and a separate head."""
TRAINED_MOE = "qwen3moe_untied"


def make_model(name: str, directory: Path) -> torch.nn.Module:
    import transformers

    kind, tie = name.split("_")
    config_class, extra = KINDS[kind]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie == "tied",
        "initializer_range": 0.1,
    }
    config = getattr(transformers, config_class)(**sizes | extra)
    torch.manual_seed(ALL_MODELS.index(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if name in MOE_MODELS + LATENT_MODELS:
        model.set_experts_implementation("eager")  # the default has no float64
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.normal_(1.0, 0.2)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(directory / name)
    return model


@torch.no_grad()
def save_logits(model: torch.nn.Module, file: Path) -> None:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB_SIZE, (sum(SEQUENCES),), generator=random)
    logits = [model(part[None]).logits[0] for part in ids.split(SEQUENCES)]
    save_file({"token_ids": ids, "logits": torch.cat(logits)}, file)


def make_batch(step: int) -> dict[str, torch.Tensor]:
    """One rollout batch: ragged, a one-token response, a group of equal rewards (advantage 0)."""
    random = torch.Generator().manual_seed(100 + step)
    num = NUM_PROMPTS * GROUP_SIZE
    prompts = torch.randint(2, 9, (NUM_PROMPTS,), generator=random).repeat_interleave(GROUP_SIZE)
    responses = torch.randint(1, 15, (num,), generator=random)
    responses[1] = 1
    # Each minibatch (half of the groups) has a mixed group: its gradient must not be zero.
    rewards = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.float32)
    size = int((prompts + responses).sum())
    return {
        "prompt_lengths": prompts,
        "response_lengths": responses,
        "token_ids": torch.randint(0, VOCAB_SIZE, (size,), generator=random),
        "rewards": rewards,
    }


def make_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sum R] bool: which response tokens are trained on; of the second and third rollout none."""
    first, second, third = batch["response_lengths"][:3].tolist()
    random = torch.Generator().manual_seed(7)
    mask = torch.rand(int(batch["response_lengths"].sum()), generator=random) < 0.6
    mask[first : first + second + third] = False
    return mask


def plain_name(
    model: str, k: int = K, alpha: float = ALPHA, eps: float = EPS, predicted: bool = False
) -> str:
    """File of the plain trainer's results for these settings, without the suffix."""
    kind = "predicted" if predicted else "plain"
    return f"{model}.{kind}-k{k}-alpha{alpha}-eps{eps}"


def make_references(directory: Path, plain: Iterable[tuple[str, int, float, float, bool]]) -> None:
    """Everything that workers read from `directory`; the plain trainer's results for each (model,
    K, alpha, Adam's eps, whether its trajectory is predicted) of `plain`."""
    from plain_sfpo import Settings, train

    wanted = sorted({*plain, *((name, K, ALPHA, EPS, False) for name in (*TRAINED, TRAINED_MOE))})
    batches = [make_batch(step) for step in range(NUM_STEPS)]
    for step, batch in enumerate(batches):
        save_file(batch, directory / f"batch{step}.safetensors")
    for name in ALL_MODELS:
        model = make_model(name, directory)
        save_logits(model, directory / f"{name}.logits.safetensors")
        if name == TRAINED[0]:
            mask = make_mask(batches[0])
            exact_gradients.save_next_token(model, batches[0], directory, name, mask)
        if name in (*TRAINED, TRAINED_MOE):
            for masked in (False, True) if name == TRAINED[0] else (False,):
                exact_gradients.save(
                    model,
                    batches[0],
                    directory,
                    f"{name}-masked" if masked else name,
                    group_size=GROUP_SIZE,
                    entropy_coef=ENTROPY_COEF,
                    mask=make_mask(batches[0]) if masked else None,
                )
        for _, k, alpha, eps, predicted in filter(lambda each: each[0] == name, wanted):
            settings = Settings(
                k=k, alpha=alpha, minibatches=MINIBATCHES, group_size=GROUP_SIZE, lr=LR,
                weight_decay=WEIGHT_DECAY, clip_grad=CLIP_GRAD, clip=0.2, entropy_coef=ENTROPY_COEF,
                eps=eps, predicted=predicted,
            )  # fmt: skip
            losses, weights = train(copy.deepcopy(model), batches, settings)
            file = directory / plain_name(name, k, alpha, eps, predicted)
            file.with_name(f"{file.name}.json").write_text(json.dumps(losses))
            save_file(weights, file.with_name(f"{file.name}.safetensors"))


def load_batch(directory: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(directory / f"batch{step}.safetensors")
