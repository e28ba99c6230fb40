"""What `rollout.async_steps: 1` gains: step time with and without, one trainer rank and one engine.

    python benchmarks/overlap.py [--steps 12] [--out FILE]

Whole runs of `sfpo-megatron train` on CPU: one Megatron rank of one thread, one vLLM engine of one
thread, a random model whose responses run to the limit. A pilot chooses the number of fast passes
with which generation and passes take about the same time; that is where overlap can gain most (2x).

Prints a table and writes benchmarks/results/overlap.json. A target that is missed is printed as
missed; it does not fail the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch
import yaml

from benchmarks.common import provenance
from sfpo_megatron.outputs.directory import RunDirectory

MIN_SPEEDUP = 1.4
WARM_UP_STEPS = 2
SYMBOLS = ["<pad>", "<eos>", *"0123456789+=", *(f"w{i}" for i in range(498))]


def save_model(folder: Path) -> None:
    """Random weights: 3.4M parameters; the end of the text is one of 512 words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.Qwen2Config(
        vocab_size=len(SYMBOLS),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SYMBOLS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )


def write_config(folder: Path) -> Path:
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        # Few and long: decoding waits for its own last token, passes read all tokens at once.
        "train": {"prompts_per_step": 2, "group_size": 4, "minibatches_per_step": 2,
                  "max_tokens_per_microbatch": 2048},
        "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 480},
        "objective": {"importance_sampling": {"weight": "token"}},
        "data": {"train": [{"source": "jsonl", "path": str(folder / "sums.jsonl")}]},
        "reward": {"function": "last_number"},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"sinks": ["jsonl"]},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path, num_steps: int, fast_passes: int, async_steps: int) -> dict[str, Any]:
    """Medians over the steps after the first two."""
    out = config.parent / f"run-{fast_passes}-{async_steps}"
    overrides = {
        "output_dir": out,
        "train.num_steps": num_steps,
        "sfpo.num_fast_passes": fast_passes,
        "rollout.async_steps": async_steps,
    }
    command = [sys.executable, "-m", "sfpo_megatron", "train", str(config)]
    command += [f"{key}={value}" for key, value in overrides.items()]
    subprocess.run(
        command, check=True, cwd=provenance.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = [json.loads(line) for line in RunDirectory(out).metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][WARM_UP_STEPS:]
    if async_steps:
        steps = steps[:-1]  # beside the last nothing is generated
    keys = ("step", "generate", "passes", "logprob", "wait", "refit")
    found = {f"{key}_s": statistics.median(s[f"time/{key}_s"] for s in steps) for key in keys}
    return found | {
        "async_steps": async_steps,
        "num_fast_passes": fast_passes,
        "num_steps": len(steps),
        "staleness": max(s["staleness"] for s in steps),
        "response_tokens_mean": statistics.mean(s["response_tokens_mean"] for s in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--out", type=Path, default=provenance.ROOT / "benchmarks/results/overlap.json"
    )
    args = parser.parse_args()
    print(provenance.hardware(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model")
        config = write_config(folder)
        pilot = run(config, 5, 1, 0)
        one_pass = pilot["passes_s"] / 2
        fast_passes = max(1, round((pilot["generate_s"] - pilot["logprob_s"]) / one_pass) - 1)
        rows = [run(config, args.steps, fast_passes, async_steps) for async_steps in (0, 1)]
    speedup = rows[0]["step_s"] / rows[1]["step_s"]
    balance = rows[0]["generate_s"] / (rows[0]["passes_s"] + rows[0]["logprob_s"])
    print("async_steps | step s | generate s | passes s | log-probs s | wait s | refit s")
    for row in rows:
        print(
            f"{row['async_steps']} | {row['step_s']:.2f} | {row['generate_s']:.2f} | "
            f"{row['passes_s']:.2f} | {row['logprob_s']:.2f} | {row['wait_s']:.2f} | "
            f"{row['refit_s']:.2f}"
        )
    reached = speedup >= MIN_SPEEDUP
    print(
        f"generation / (passes and log-probs) without overlap: {balance:.2f}; {speedup:.2f} x "
        f"faster, to reach {MIN_SPEEDUP:g}: {'yes' if reached else 'NO'}"
    )
    provenance.write(
        args.out,
        {"rows": rows, "balance": balance, "speedup": speedup, "reached": reached},
        device=torch.device("cpu"),
        features=["async"],
    )


if __name__ == "__main__":
    main()
