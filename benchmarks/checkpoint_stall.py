"""How long a train step stands still for a checkpoint: written at once, or beside the training.

    python benchmarks/checkpoint_stall.py [--size 50M] [--repeats 3] [--out FILE]

One rank, bf16 params with fp32 main params and Adam's moments (14 bytes a parameter). The floor is
one copy of all that in host memory. Prints a table and writes
benchmarks/results/checkpoint_stall.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance
from benchmarks.overhead import steps
from benchmarks.overhead.weights import Sizes

SIZES = {
    "1M": steps.DEMO,
    "50M": Sizes(hidden=512, ffn=1408, layers=12, vocab=16384, heads=8, kv_heads=4),
}


def build(folder: Path, size: str) -> Any:
    """A policy after one optimizer step's worth of state."""
    from sfpo_megatron.mcore.setup import LRSchedule, build_policy, init_distributed
    from sfpo_megatron.mcore.shards.kinds import bind, members

    SIZES[size].save(folder, torch.float32)
    config = steps.run_config(folder, "bfloat16", "device")
    capabilities = init_distributed(config)
    schedule = LRSchedule(peak=1e-6, floor=0.0, warmup_ticks=0, total_ticks=9, style="constant")
    policy = build_policy(config, capabilities, schedule, model_path=str(folder))
    for member in members(policy.optimizer):
        bind(member).make_states()
    return policy


def tensors_of(policy: Any) -> list[torch.Tensor]:
    """Everything of size that a checkpoint holds."""
    params = [param.data for chunk in policy.chunks for param in chunk.parameters()]
    return [*params, *policy.shards.tensors(), *policy.shards.moments()]


def measure(policy: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """Medians, in seconds."""
    from sfpo_megatron.mcore.checkpoint import begin_save

    found: dict[str, list[float]] = {"one_copy_s": [], "async_stall_s": [], "sync_stall_s": []}
    for repeat in range(repeats + 1):
        begun = time.perf_counter()
        copies = [tensor.clone() for tensor in tensors_of(policy)]
        copied = time.perf_counter()
        del copies
        directory = folder / f"checkpoint-{repeat}"
        directory.mkdir()
        saving = time.perf_counter()
        writing = begin_save(policy, directory, step=repeat, form="native")
        stalled = time.perf_counter()
        writing.finish()
        finished = time.perf_counter()
        num_bytes = sum(file.stat().st_size for file in directory.iterdir())
        shutil.rmtree(directory)
        if repeat:  # the first also imports
            found["one_copy_s"].append(copied - begun)
            found["async_stall_s"].append(stalled - saving)
            found["sync_stall_s"].append(finished - saving)
    medians: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    return medians | {"checkpoint_bytes": num_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="50M")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= place | {"MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = torch.distributed.FileStore(str(folder / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        policy = build(folder / "model", args.size)
        row = measure(policy, folder, args.repeats)
        row["num_params"] = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
    for key, value in row.items():
        print(f"{key:18} {value:,.3f}" if isinstance(value, float) else f"{key:18} {value:,}")
    provenance.write(
        args.out or provenance.ROOT / "benchmarks/results/checkpoint_stall.json",
        {"size": args.size, **row},
        device=torch.device("cpu"),
        features=["checkpoint-async"],
    )


if __name__ == "__main__":
    main()
