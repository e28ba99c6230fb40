"""What SFPO costs beyond its passes: seconds and bytes, measured in one run.

    python benchmarks/sfpo_overhead.py [--device cpu|cuda] [--sizes 1M,500M] [--out FILE]

(a) snapshot + reposition against the bytes they must move and against the reference's way
    (overhead/speed.py), on 1M to 500M parameters.

Prints tables and writes benchmarks/results/sfpo_overhead.json. A target that is missed is printed
as missed; it does not fail the run.
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
from benchmarks.overhead import speed
from benchmarks.overhead.weights import SIZES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--sizes", default=",".join(SIZES), help="of the weights, by comma")
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds for each size")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    out = args.out or provenance.ROOT / "benchmarks/results" / (
        "sfpo_overhead.json" if device.type == "cpu" else "sfpo_overhead_gpu.json"
    )
    print(provenance.hardware(device))
    rows = []
    print(f"\n(a) snapshot + reposition; targets: floor <= {speed.MAX_RATIO_TO_FLOOR}x, "
          f"reference >= {speed.MIN_SPEEDUP}x\n{speed.HEADER}")  # fmt: skip
    for size in args.sizes.split(","):
        rows.append(isolated(speed.measure, size, device, args.budget_s))
        print(speed.line(rows[-1]), flush=True)
    content: dict[str, Any] = {"speed": rows}
    provenance.write(out, content, device=device, features=["overhead"])


if __name__ == "__main__":
    main()
