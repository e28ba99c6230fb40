"""Tiny random Qwen2 and Qwen3-MoE models with a tokenizer, head_dim 32, GQA 4:2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

EOS = 1
CHARACTERS = "0123456789+-*=() ." + "".join(chr(0x4E00 + i) for i in range(300))
VOCABULARY = ("<pad>", "<eos>", *CHARACTERS)


def make_model(
    directory: Path,
    *,
    vocabulary: Sequence[str] = VOCABULARY,
    seed: int = 0,
    tied: bool = True,
    layers: int = 2,
    num_experts: int = 0,
    initializer_range: float = 0.2,
) -> Path:
    """A Hugging Face directory. `vocabulary` starts with `<pad>`, `<eos>`; one token a character.

    The large default weights make greedy text that differs with the seed.
    """
    import transformers

    kind, extra = "Qwen2", {}
    if num_experts:
        kind = "Qwen3Moe"
        # 40 is not a multiple of 32: vLLM's CPU kernel pads the experts.
        extra = {"num_experts": num_experts, "moe_intermediate_size": 40, "norm_topk_prob": True}
        extra |= {"num_experts_per_tok": 2, "head_dim": 32}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=initializer_range,
        **extra,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at initialisation, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=initializer_range)
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
