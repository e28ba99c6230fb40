"""Make a small random Qwen2-style model directory, with a tokenizer fitted to a task's prompts.

    python tools/make_tiny_model.py --out runs/demo/model --config examples/demo/config.yaml

The tokenizer is byte-level BPE, so any text round-trips: digits are one token each, the words of
the task's prompts are whole tokens. Its size is made odd on purpose: no tensor-parallel size
divides it, so every run with this model also exercises vocabulary padding.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

TOOL = "make_tiny_model"
_WRITTEN = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
)
PAD, EOS = "<|pad|>", "<|endoftext|>"


_CONFIGS = {
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "llama": "LlamaConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "deepseek_v3": "DeepseekV3Config",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--config", default="examples/demo/config.yaml", help="has data.train")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--arch", choices=tuple(_CONFIGS), default="qwen2")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32, help="vLLM on CPU needs 32 or more")
    parser.add_argument("--ffn", type=int, default=256, help="of the MLP, or of one expert")
    parser.add_argument("--num-experts", type=int, default=8, help="of a layer with experts")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--init-std", type=float, default=0.02)
    parser.add_argument("--max-vocab", type=int, default=383, help="upper limit of the vocabulary")
    parser.add_argument("--max-positions", type=int, default=256, help="longest sequence")
    tied = parser.add_mutually_exclusive_group()
    tied.add_argument(
        "--tied",
        dest="tied",
        action="store_true",
        default=True,
        help="the default, but for deepseek_v3",
    )
    tied.add_argument("--untied", dest="tied", action="store_false")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was written, keep others' files"
    )
    return parser.parse_args(argv)


def task_texts(config_path: str) -> list[str]:
    """Prompts and answers of the config's training sources."""
    from sfpo_megatron.config.load import load_config
    from sfpo_megatron.data.prompts import train_rows

    config = load_config(config_path)
    suffix = config.data.prompt_suffix
    return [text for row in train_rows(config) for text in (row.question + suffix, row.answer)]


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


def model_config(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The Hugging Face config of `args.arch`."""
    import transformers

    experts: dict[str, Any] = {}
    if args.arch == "mixtral":
        experts = {"num_local_experts": args.num_experts}
    elif args.arch == "qwen3_moe":
        experts = {"num_experts": args.num_experts, "norm_topk_prob": True}
        experts["moe_intermediate_size"] = args.ffn
    elif args.arch == "deepseek_v3":
        experts = _latent_sizes(args)
    if experts:
        experts["num_experts_per_tok"] = args.experts_per_token
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "num_key_value_heads": args.num_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn,
        "max_position_embeddings": args.max_positions,
        "tie_word_embeddings": args.tied,
        "initializer_range": args.init_std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    return getattr(transformers, _CONFIGS[args.arch])(**common | experts)


def _latent_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Config entries of DeepSeek-V3: `--head-dim` is that of values and of unrotated keys; the
    sizes of the latent vector are those that vLLM's CPU kernel has."""
    return {
        "tie_word_embeddings": False,  # vLLM's class cannot
        "n_routed_experts": args.num_experts,
        "moe_intermediate_size": args.ffn,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": args.num_heads,
        "q_lora_rank": args.hidden_size // 2,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": args.head_dim,
        "qk_rope_head_dim": 64,
        "head_dim": 64,
        "v_head_dim": args.head_dim,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_mtp_layers": 0,
    }


def make_tiny_model(args: argparse.Namespace) -> Path:
    """Write the directory; returns it."""
    import torch
    from transformers import AutoModelForCausalLM

    from sfpo_megatron.outputs.owned import writing

    tokenizer = train_tokenizer(task_texts(args.config), args.max_vocab)
    config = model_config(args, tokenizer)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _scale_down_residual_writes(model, args.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        model.save_pretrained(made)  # config.json, generation_config.json, model.safetensors
        tokenizer.save_pretrained(made)
        with writing(
            args.out,
            tool=TOOL,
            inputs=(),
            overwrite=args.overwrite,
            adopts=lambda name: _is_same(made / name, args.out / name),
        ) as aside:
            shutil.copytree(made, aside, dirs_exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {args.arch}, {parameters:,} parameters, {len(tokenizer)} tokens")
    return Path(args.out)


def _is_same(made: Path, there: Path) -> bool:
    """Whether a file without a marker is what is made now, so that an earlier version made it."""
    return made.is_file() and there.is_file() and filecmp.cmp(made, there, shallow=False)


def main(argv: list[str] | None = None) -> int:
    """Refuse what may not be written, before anything is made."""
    args = parse_args(argv)
    from sfpo_megatron.outputs.owned import NotOurs, check_owned

    names = _WRITTEN.__contains__
    try:
        check_owned(args.out, tool=TOOL, inputs=(), overwrite=args.overwrite, adopts=names)
        make_tiny_model(args)
    except NotOurs as error:
        print(f"error: {error}{_hint(args.out)}", file=sys.stderr)
        return 2
    return 0


def _hint(out: Path) -> str:
    """How to make room, where an earlier version of this tool, which left no marker, may have
    written with another seed or other sizes."""
    from sfpo_megatron.outputs.owned import MARKER

    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if "config.json" not in names or MARKER in names or not names <= set(_WRITTEN):
        return ""
    free = (f"{out}.old{number or ''}" for number in itertools.count())
    old = next(path for path in free if not os.path.lexists(path))
    return f" (of an earlier version of this tool? mv {shlex.quote(str(out))} {shlex.quote(old)})"


def _scale_down_residual_writes(model: Any, num_layers: int) -> None:
    """GPT-2's rule: what writes into the residual stream shrinks by sqrt(2 x layers), so that its
    variance does not grow with depth."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter /= math.sqrt(2 * num_layers)


if __name__ == "__main__":
    # Run from a checkout as a script, so that the package need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main())
