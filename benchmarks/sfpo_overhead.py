"""What SFPO costs beyond its passes: seconds and bytes, measured in one run.

    python benchmarks/sfpo_overhead.py [--device cpu|cuda] [--sizes 1M,500M] [--out FILE]

(a) snapshot + reposition against the bytes they must move and against the reference's way
    (overhead/speed.py), on 1M to 500M parameters, on a GPU 100M to 7B;
(b) snapshot + reposition + extra gathers against the passes of the same Megatron train steps, on
    two CPU ranks or one GPU (overhead/steps.py);
(c) their peak extra memory (overhead/memory.py).

Prints tables and writes benchmarks/results/sfpo_overhead.json. A goal that is missed is named in
its row (`missed`); it does not fail the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance
from benchmarks.common.isolated import isolated
from benchmarks.overhead import memory, speed, steps
from benchmarks.overhead.weights import ON_CPU, ON_GPU, SIZES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--sizes", help="of the weights, by comma")
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds for each size")
    parser.add_argument("--steps", type=int, default=20, help="train steps of each kind in (b)")
    parser.add_argument("--memory-size", choices=tuple(SIZES), default="100M", help="in (c)")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    out = args.out or provenance.ROOT / "benchmarks/results" / (
        "sfpo_overhead.json" if device.type == "cpu" else "sfpo_overhead_gpu.json"
    )
    print(provenance.hardware(device))
    print("\n(a) snapshot + reposition, to reach: at most "
          f"{speed.MAX_RATIO_TO_FLOOR[device.type]} x floor, at least {speed.MIN_SPEEDUP} x "
          f"faster than the reference's way\n{speed.HEADER}")  # fmt: skip
    speeds = []
    sizes = args.sizes.split(",") if args.sizes else ON_CPU if device.type == "cpu" else ON_GPU
    for size in sizes:
        speeds.append(isolated(speed.measure, size, device, args.budget_s))
        print(speed.line(speeds[-1]), flush=True)
    found: dict[str, Any] = {"speed": speeds}
    provenance.keep(out, found, device=device)

    print(f"\n(b) overhead of a train step, to reach: at most {steps.MAX_OVERHEAD}", flush=True)
    in_steps = steps.measure(device, args.steps)
    if isinstance(in_steps, str):
        print(in_steps)
    else:
        print("\n".join([steps.HEADER, *map(steps.line, in_steps)]))
    found["steps"] = in_steps
    provenance.keep(out, found, device=device)

    print("\n(c) peak extra memory, to reach: one copy of the shard, three with moments: restore, "
          f"two staging buckets beside it with host\n{memory.HEADER}")  # fmt: skip
    memories = []
    for arm in memory.ARMS:
        memories.append(isolated(memory.measure, args.memory_size, device, arm))
        print(memory.line(memories[-1]), flush=True)

    provenance.write(out, found | {"memory": memories}, device=device, features=["overhead"])


if __name__ == "__main__":
    main()
