"""What a refit costs: seconds, GB/s and memory against the copy floor and the naive ways.

    python benchmarks/refit.py [--sizes 20M,100M] [--out FILE]

Qwen2-shaped models (bf16, no optimizer state) on Megatron ranks at TP1, TP2, PP2 and DP2, one live
vLLM engine (TP 1). Ways: `streamed`, what a run does; `gathered`, the full state on rank 0, then
one bucket; `save_and_reload`, `save_and_restart`, a Hugging Face directory that the engine reads
again or that another engine is started on.

The floor is one read and one write of every byte at the copy bandwidth of one thread, for each hop
that cannot be left out: trainer's shards -> memory that both sides have; that -> vLLM's parameters;
these -> the packed form that vLLM computes with on a CPU. The last is no plain copy: beside the
floor stands one with it at the speed that vLLM's own packing has here ("x packing").

Memory is what a process holds beyond what it held before the first refit of all.

Prints a table and writes benchmarks/results/refit.json. A target that is missed is printed as
missed; it does not fail the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance
from benchmarks.overhead.weights import SIZES, Sizes
from benchmarks.refitting.packing import pack_gb_per_s

MODELS = {
    "20M": Sizes(hidden=384, ffn=1024, layers=8, vocab=16384, heads=6, kv_heads=2),
    "100M": SIZES["100M"],
    "500M": SIZES["500M"],
}
HOPS = (
    "trainer's shards -> shared buffer",
    "shared buffer -> vLLM's parameters",
    "vLLM's parameters -> their packed form (CPU)",
)
MAX_RATIO_TO_FLOOR, MIN_SPEEDUP = 3.0, 10.0
BUCKET_BYTES = 32 * 2**20
WORLDS = ((1, ("TP1",)), (2, ("TP2", "PP2", "DP2")))
HEADER = (
    "size | layout | way | seconds | GB/s | x floor | x packing | trainer MiB | engine MiB |"
    " reached"
)


def copy_gb_per_s(num_bytes: int) -> float:
    """Bytes copied a second by one thread, each read once and written once; best of seven."""
    torch.set_num_threads(1)
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return num_bytes / best / 1e9


def save_model(folder: Path, sizes: Sizes) -> None:
    """A Hugging Face directory with random weights and a tokenizer that has nothing to do."""
    from tokenizers import Tokenizer, models

    sizes.save(folder, torch.bfloat16)
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )


def run_ranks(folder: Path, world: int, layouts: tuple[str, ...], rounds: int) -> list[Any]:
    spec = {
        "layouts": layouts,
        "bucket_bytes": BUCKET_BYTES,
        "rounds": rounds,
        "naive_layouts": ["TP1"],
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", "-m", "benchmarks.refitting.ranks", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment, cwd=provenance.ROOT)
    return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def judged(rows: list[dict[str, Any]], copying: float, packing: float) -> list[dict[str, Any]]:
    """With the floor, the speed-up over both naive ways, and what was to be reached (the stricter
    reading: against the faster of the two). `copying`, `packing`: GB/s."""
    saved = {r["way"]: r["median_s"] for r in rows if r["way"].startswith("save")}
    found = []
    for row in rows:
        hop_s = row["model_bytes"] / copying / 1e9
        packing_s = row["model_bytes"] / packing / 1e9
        floor_s, with_packing_s = len(HOPS) * hop_s, (len(HOPS) - 1) * hop_s + packing_s
        more = {
            "floor_s": floor_s,
            "ratio_to_floor": row["median_s"] / floor_s,
            "ratio_to_floor_with_packing": row["median_s"] / with_packing_s,
        }
        if row["way"] == "streamed":
            speedups = {way: seconds / row["median_s"] for way, seconds in saved.items()}
            more |= {f"speedup_over_{way}": speedup for way, speedup in speedups.items()}
            more["reached"] = more["ratio_to_floor"] <= MAX_RATIO_TO_FLOOR and (
                row["size"] != "100M" or min(speedups.values()) >= MIN_SPEEDUP
            )
            bucket = max(BUCKET_BYTES, row["largest_tensor_bytes"])
            more["peak_in_buckets"] = (
                max(row["trainer_peak_bytes"], row["engine_peak_bytes"]) / bucket
            )
        found.append(row | more)
    return found


def line(row: dict[str, Any]) -> str:
    reached = {None: "", True: "yes", False: "NO"}[row.get("reached")]
    return (
        f"{row['size']} | {row['layout']} | {row['way']} | {row['median_s']:.3f} | "
        f"{row['gb_per_s']:.2f} | {row['ratio_to_floor']:.1f} | "
        f"{row['ratio_to_floor_with_packing']:.1f} | "
        f"{row['trainer_peak_bytes'] / 2**20:.0f} | {row['engine_peak_bytes'] / 2**20:.0f} | "
        f"{reached}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=",".join(MODELS), help="of the models, by comma")
    parser.add_argument("--rounds", type=int, default=7, help="timed refits of each way")
    parser.add_argument(
        "--out", type=Path, default=provenance.ROOT / "benchmarks/results/refit.json"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    print(f"{provenance.hardware(torch.device('cpu'))}\nhops of the floor: {'; '.join(HOPS)}")
    print(f"to reach: {MAX_RATIO_TO_FLOOR:g} x floor; at 100M {MIN_SPEEDUP:g} x faster than saving")
    rows: list[dict[str, Any]] = []
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_model(folder / "model", MODELS[size])
            matrices = [(s[0], s[1]) for s in MODELS[size].shapes() if len(s) == 2]
            copying, packing = copy_gb_per_s(256 * 2**20), pack_gb_per_s(matrices)
            print(
                f"\n{size}: one thread copies {copying:.1f} GB/s, packs {packing:.1f}\n{HEADER}",
                flush=True,
            )
            of_size: list[dict[str, Any]] = []
            for world, layouts in WORLDS:
                found = run_ranks(folder, world, layouts, args.rounds)
                speeds = {"copy_gb_per_s": copying, "pack_gb_per_s": packing}
                of_size += [{"size": size, **speeds} | row for row in found]
            rows += judged(of_size, copying, packing)
            print("\n".join(line(row) for row in rows if row["size"] == size), flush=True)
    provenance.write(
        args.out,
        {"hops": HOPS, "bucket_bytes": BUCKET_BYTES, "rows": rows},
        device=torch.device("cpu"),
        features=["refit-speed"],
    )


if __name__ == "__main__":
    main()
