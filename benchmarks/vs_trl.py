"""Seconds a train step beside TRL's GRPOTrainer: same model, prompts, batch, optimizer, cores.

    python benchmarks/vs_trl.py [--case NAME ...] [--rounds 3] [--steps 10] [--no-accuracy]
    python benchmarks/vs_trl.py --quick --out FILE         whether all of it works

TRL runs in a venv of its own, which is made in --venv (requirements/trl.txt), in two ways to share
the two cores; the ratio is to the faster one. It generates with transformers, as it does by
default. Whole runs take turns, round after round; the figure is the median of all steps after the
first two of each run. Beside it: where our time goes, and the passes' share of the GEMM peak that
is measured here. Then, with three seeds: seconds of training until three batches together reach an
accuracy, for which the case `short` has to be among those that are measured (--no-accuracy spares
it).

Prints a table and writes benchmarks/results/vs_trl.json. A target that is missed is printed as
missed; it does not fail the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance
from benchmarks.common.isolated import isolated
from benchmarks.versus import peak, race, rows, theirs
from benchmarks.versus.cases import CASES, prepare

NUM_CORES = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="train steps of a run")
    parser.add_argument("--quick", action="store_true", help="one round of 3 steps, TRL in one way")
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True,
                        help="time to equal accuracy too (default: yes)")  # fmt: skip
    default = provenance.ROOT / ".cache/venv-trl"
    parser.add_argument("--venv", type=Path, default=default, help="of TRL; made where it is not")
    out = provenance.ROOT / "benchmarks/results/vs_trl.json"
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rounds, num_steps = (1, 3) if args.quick else (args.rounds, args.steps)
    layouts = theirs.LAYOUTS[:1] if args.quick else theirs.LAYOUTS
    python = theirs.python_of(args.venv.absolute())
    peak_flops = isolated(peak.gemm_flops, NUM_CORES)
    print(provenance.hardware(torch.device("cpu")))
    print(f"GEMM peak: {peak_flops / 1e9:.0f} GFLOP/s (fp32)\n{rows.HEADER}", flush=True)
    measured, races = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if case.name in (args.case or [case.name]):
                material = prepare(case, Path(scratch) / case.name)
                runs = rows.take_turns(
                    python, case, material, layouts, rounds=rounds, num_steps=num_steps
                )
                measured.append(rows.row_of(case, material, runs, peak_flops))
                print(rows.line(measured[-1]), flush=True)
        for row in measured:
            print(rows.where_time_goes(row))
        layout = race.faster_layout(measured)
        if args.accuracy and layout is None:
            print(f"\nno time to accuracy: it needs --case {race.CASE.name}")
        elif args.accuracy and layout is not None:
            print(f"\n{race.HEADER}", flush=True)
            for found in race.run(python, Path(scratch), layout, quick=args.quick):
                races.append(found)
                print(race.line(found), flush=True)
        for found in race.medians(races):
            print(race.median_line(found))
    provenance.write(
        args.out,
        {"gemm_flops": peak_flops, "trl": theirs.versions(python), "cases": measured,
         "accuracy": races, "accuracy_medians": race.medians(races)},
        device=torch.device("cpu"),
        features=[],
    )  # fmt: skip


if __name__ == "__main__":
    main()
