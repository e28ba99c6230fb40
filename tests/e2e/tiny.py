"""Tiny random Qwen2, Qwen3-MoE (head_dim 32, GQA 4:2) and DeepSeek-V3 models with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

EOS = 1
CHARACTERS = "0123456789+-*=() ." + "".join(chr(0x4E00 + i) for i in range(300))
VOCABULARY = ("<pad>", "<eos>", *CHARACTERS)

DEEPSEEK_V3: dict[str, Any] = {
    "tie_word_embeddings": False,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 72,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,  # these two: the sizes that vLLM's CPU kernel has
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_mtp_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def randomize_choice_biases(model: torch.nn.Module) -> None:
    """Fill the biases of DeepSeek-V3's routers: initially zero, they would hide a lost one."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)


def make_model(
    directory: Path,
    *,
    vocabulary: Sequence[str] = VOCABULARY,
    seed: int = 0,
    tied: bool = True,
    layers: int = 2,
    num_experts: int = 0,
    latent: bool = False,
    initializer_range: float = 0.2,
) -> Path:
    """A Hugging Face directory. `vocabulary` starts with `<pad>`, `<eos>`; one token a character.

    The large default weights make greedy text that differs with the seed.
    """
    import transformers

    kind: str = "Qwen2"
    extra: dict[str, Any] = {}
    if num_experts:
        kind = "Qwen3Moe"
        # 40 is not a multiple of 32: vLLM's CPU kernel pads the experts.
        extra = {"num_experts": num_experts, "moe_intermediate_size": 40, "norm_topk_prob": True}
        extra |= {"num_experts_per_tok": 2, "head_dim": 32}
    if latent:
        kind, extra = "DeepseekV3", DEEPSEEK_V3
    common: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "initializer_range": initializer_range,
    }
    config = getattr(transformers, f"{kind}Config")(**common | extra)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at initialisation, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=initializer_range)
        randomize_choice_biases(model)
    model.save_pretrained(directory)
    make_tokenizer(directory, vocabulary)
    return directory


def make_tokenizer(directory: Path, vocabulary: Sequence[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def load_state(directory: Path) -> dict[str, torch.Tensor]:
    """Name -> full tensor, as the checkpoint has them."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")
