"""Small random model directories, with a tokenizer fitted to a task's prompts and solutions.

The tokenizer is byte-level BPE, so any text round-trips: digits are one token each, the words of
the task are whole tokens. Its size is made odd on purpose: no tensor-parallel size
divides it, so every run with this model also exercises vocabulary padding.
"""

from __future__ import annotations

import filecmp
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.reading import train_rows
from sfpo_megatron.data.taught import completion_of
from sfpo_megatron.outputs.aside import writing
from sfpo_megatron.outputs.owned import check_owned

TOOL = "make_tiny_model"
WRITTEN = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
)
PAD, EOS = "<|pad|>", "<|endoftext|>"
ARCHITECTURES = {
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "llama": "LlamaConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "deepseek_v3": "DeepseekV3Config",
}


@dataclass(kw_only=True, frozen=True, slots=True)
class TinyModel:
    """Sizes of a tiny model; those of experts count in a mixture of experts alone."""

    arch: str = "qwen2"
    """One of `ARCHITECTURES`."""
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    """vLLM on CPU needs 32 or more."""
    ffn: int = 256
    """Hidden size of the MLP, or of one expert."""
    num_experts: int = 8
    experts_per_token: int = 2
    init_std: float = 0.02
    max_vocab: int = 383
    """Upper limit of the vocabulary."""
    max_positions: int = 256
    """Longest sequence."""
    tied: bool = True
    """Tied embeddings; deepseek_v3 has none."""


DEMO = TinyModel(max_vocab=1023)
"""The model of `sfpo-megatron demo`."""


def task_texts(config: RunConfig) -> list[str]:
    """Prompts of the training sources, and what a warm start learns to answer."""
    data = config.data
    texts = []
    for row in train_rows(config):
        taught = completion_of(row)
        prompt = f"{data.prompt_prefix}{row.question}{data.prompt_suffix}"
        texts += [prompt, taught if isinstance(taught, str) else row.answer]
    return texts


def train_tokenizer(texts: list[str], max_vocab: int) -> Any:
    """Qwen2's tokenizer with a vocabulary of its own, an odd number of tokens.

    The class is Qwen2Tokenizer for every architecture: transformers 5 loads the tokenizer of a
    qwen2 directory as that class whatever tokenizer_config.json says, so its text splitting is
    the one to train under.
    """
    from transformers import Qwen2Tokenizer

    backend = _byte_level_bpe(texts, max_vocab)
    if backend.get_vocab_size() % 2 == 0:
        backend = _byte_level_bpe(texts, backend.get_vocab_size() - 1)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=EOS,  # never produced (every byte is a token), but must be some token
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1 << 30,
    )


def _byte_level_bpe(texts: list[str], max_vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    splitting = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = splitting.normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(sizes: TinyModel, tokenizer: Any) -> Any:
    """The Hugging Face config of these sizes."""
    import transformers

    experts: dict[str, Any] = {}
    if sizes.arch == "mixtral":
        experts = {"num_local_experts": sizes.num_experts}
    elif sizes.arch == "qwen3_moe":
        experts = {"num_experts": sizes.num_experts, "norm_topk_prob": True}
        experts["moe_intermediate_size"] = sizes.ffn
    elif sizes.arch == "deepseek_v3":
        experts = _latent_sizes(sizes)
    if experts:
        experts["num_experts_per_tok"] = sizes.experts_per_token
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn,
        "max_position_embeddings": sizes.max_positions,
        "tie_word_embeddings": sizes.tied,
        "initializer_range": sizes.init_std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    return getattr(transformers, ARCHITECTURES[sizes.arch])(**common | experts)


def _latent_sizes(sizes: TinyModel) -> dict[str, Any]:
    """Config entries of DeepSeek-V3: `head_dim` is that of values and of unrotated keys; the
    sizes of the latent vector are those that vLLM's CPU kernel has."""
    return {
        "tie_word_embeddings": False,  # vLLM's class cannot
        "n_routed_experts": sizes.num_experts,
        "moe_intermediate_size": sizes.ffn,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": sizes.num_heads,
        "q_lora_rank": sizes.hidden_size // 2,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": sizes.head_dim,
        "qk_rope_head_dim": 64,
        "head_dim": 64,
        "v_head_dim": sizes.head_dim,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_mtp_layers": 0,
    }


def make_tiny_model(
    config: RunConfig, out: Path, sizes: TinyModel, *, seed: int, overwrite: bool = False
) -> None:
    """Write a model for the task of `config` to `out`, its weights random by `seed`; NotOurs where
    others' files are in the way, which `overwrite` keeps."""
    check_owned(out, tool=TOOL, inputs=(), overwrite=overwrite, adopts=WRITTEN.__contains__)
    tokenizer = train_tokenizer(task_texts(config), sizes.max_vocab)
    write_model(tokenizer, out, sizes, seed=seed, overwrite=overwrite)


def write_model(
    tokenizer: Any, out: Path, sizes: TinyModel, *, seed: int, overwrite: bool = False
) -> None:
    """Write a model of random weights for a tokenizer, and the tokenizer, to `out`; NotOurs as
    above."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(sizes, tokenizer), dtype=torch.float32)
    _scale_down_residual_writes(model, sizes.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        model.save_pretrained(made)  # config.json, generation_config.json, model.safetensors
        tokenizer.save_pretrained(made)
        with writing(
            out,
            tool=TOOL,
            inputs=(),
            overwrite=overwrite,
            adopts=lambda name: _is_same(made / name, out / name),
        ) as aside:
            shutil.copytree(made, aside, dirs_exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {sizes.arch}, {parameters:,} parameters, {len(tokenizer)} tokens")


def _is_same(made: Path, there: Path) -> bool:
    """Whether a file without a marker is what is made now, so that an earlier version made it."""
    return made.is_file() and there.is_file() and filecmp.cmp(made, there, shallow=False)


def _scale_down_residual_writes(model: Any, num_layers: int) -> None:
    """GPT-2's rule: what writes into the residual stream shrinks by sqrt(2 x layers), so that its
    variance does not grow with depth."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter /= math.sqrt(2 * num_layers)
