r"""Time and memory of reading prompts, beside the tokenizer's own batch call.

    python benchmarks/data.py [--scale 0.1] [--out FILE]

(a) 500,000 distinct rows of 170 tokens: the time that `PromptStream` takes divided by that of one
    call of the tokenizer for the same texts, and the greatest resident size of the process;
(b) 1,800,000 rows of which 17,400 are distinct.

Each runs in a process of its own. Targets: (a) 1.2 and 2 GB, (b) 60 s and 1 GB. A target that is
missed is printed as missed; it does not fail the run. `--scale` takes a part of the rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance

DISTINCT, REPEATED, OF_THOSE = 500_000, 1_800_000, 17_400
NUM_TOKENS = 170
RATIO, BYTES_A, SECONDS_B, BYTES_B = 1.2, 2e9, 60.0, 1e9


def words() -> list[str]:
    """Words that the tokenizer has as one token each."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2000)]


def tokenizer() -> Any:
    """A byte-level BPE of transformers' that has learned `words`."""
    from sfpo_megatron.demo.tiny_model import train_tokenizer

    return train_tokenizer([" ".join(words())] * 8, 16_000)


def questions(count: int) -> Iterator[str]:
    """Different questions of about NUM_TOKENS tokens."""
    draw, known = random.Random(1), words()
    for number in range(count):
        yield f"{number} " + " ".join(draw.choices(known, k=NUM_TOKENS - 5))


def write(path: Path, count: int, distinct: int) -> None:
    """A jsonl file of `count` rows."""
    asked = list(questions(distinct))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": asked[number % distinct], "answer": str(number % distinct)}
            file.write(json.dumps(row) + "\n")


def measure(path: str, results: Any, *, against: bool) -> None:
    """Read the prompts of `path` in this process; `against`: the tokenizer's own call too."""
    from sfpo_megatron.config.tree import (
        DataConfig,
        DataSource,
        ModelConfig,
        RewardConfig,
        RolloutConfig,
        RunConfig,
    )
    from sfpo_megatron.data import PromptStream

    made = tokenizer()
    config = RunConfig(
        output_dir="unused",
        model=ModelConfig(path="unused"),
        data=DataConfig(train=(DataSource(source="jsonl", path=path),)),
        rollout=RolloutConfig(max_prompt_tokens=1024),
        reward=RewardConfig(function="math"),
    )
    made(["warm up"] * 64)
    begun = time.perf_counter()
    stream = PromptStream(config, made)
    found = {
        "num_prompts": len(stream.prompts),
        "seconds": time.perf_counter() - begun,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens_per_prompt": sum(len(p.token_ids) for p in stream.prompts[:100]) / 100,
    }
    if against:
        texts = [row.question for row in stream.prompts.rows]
        del stream
        gc.collect()
        begun = time.perf_counter()
        made(texts)
        found["tokenizer_seconds"] = time.perf_counter() - begun
    results.put(found)


def in_a_process(path: Path, *, against: bool) -> dict[str, float]:
    """`measure`, with a memory of its own."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=measure, args=(str(path), results), kwargs={"against": against})
    process.start()
    found: dict[str, float] = results.get()
    process.join()
    return found


def judged(name: str, value: float, target: float) -> str:
    """A figure with its target."""
    return f"{name} {value:,.2f} (target {target:,.2f}: {'met' if value <= target else 'missed'})"


def main() -> None:
    """Measure both, print, and write --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the rows (default: all)")
    parser.add_argument("--out", type=Path, help="file of figures")
    arguments = parser.parse_args()
    scale = arguments.scale
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, int(DISTINCT * scale), int(DISTINCT * scale))
        distinct = in_a_process(file, against=True)
        write(file, int(REPEATED * scale), int(OF_THOSE * scale))
        repeated = in_a_process(file, against=False)
    ratio = distinct["seconds"] / distinct["tokenizer_seconds"]
    print(
        f"(a) {distinct['num_prompts']:,} prompts of {distinct['tokens_per_prompt']:.0f} tokens in "
        f"{distinct['seconds']:.1f} s; the tokenizer alone {distinct['tokenizer_seconds']:.1f} s: "
        f"{judged('times', ratio, RATIO)}, {judged('GB', distinct['bytes'] / 1e9, BYTES_A / 1e9)}"
    )
    print(
        f"(b) {int(REPEATED * scale):,} rows, {repeated['num_prompts']:,} distinct: "
        f"{judged('s', repeated['seconds'], SECONDS_B * min(scale, 1.0))}, "
        f"{judged('GB', repeated['bytes'] / 1e9, BYTES_B / 1e9)}"
    )
    device = torch.device("cpu")
    print(provenance.hardware(device))
    result = {"scale": scale, "distinct": distinct, "repeated": repeated, "ratio": ratio}
    provenance.write(
        arguments.out or provenance.ROOT / "benchmarks" / "results" / "data.json",
        result,
        device=device,
        features=[],
    )


if __name__ == "__main__":
    main()
