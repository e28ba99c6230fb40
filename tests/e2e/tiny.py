"""Tiny random Qwen2 models with a tokenizer, made on the spot: head_dim 32, GQA 4:2, 320 tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB_SIZE = 320
EOS = 1
ALPHABET = "0123456789+-*=() ."


def make_model(directory: Path, *, seed: int, tied: bool, eos_bias: float = 0.0) -> Path:
    """A Hugging Face directory. Large random weights: greedy text that differs with the seed.

    `eos_bias` > 0 (untied only) makes the end-of-sequence token likely, so that responses end.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at initialisation, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.2)
        if eos_bias:
            # The final norm's output has unit scale: a head row along its weight is a bias.
            model.lm_head.weight.data[EOS] += eos_bias * torch.randn(128)
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def make_tokenizer(directory: Path) -> None:
    """One token a character; `<pad>` 0, `<eos>` 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": EOS}
    characters = ALPHABET + "".join(chr(0x4E00 + i) for i in range(VOCAB_SIZE))
    for character in characters[: VOCAB_SIZE - 2]:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
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
