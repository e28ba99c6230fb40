"""Seconds from the command to the first step, by what they were waited for.

    python benchmarks/startup.py [--rounds 3] [--checkout DIR ...] [--out FILE]

Starts the demo's run on a model of its size, notes when each event of `--json` comes, and ends the
run when it has started. Several checkouts are measured in turn, round after round. Prints a table
and writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance
from benchmarks.common.demo_run import demo_run

BEFORE_RANKS = "launch"
"""Until rank 0 says its first word: two Pythons, the launcher's imports, the config's check."""


def events_of(checkout: Path, words: list[str]) -> Iterator[tuple[float, str]]:
    """(seconds since the command, what is waited for from then on), until the run has started:
    `started`."""
    command = [sys.executable, "-m", "sfpo_megatron", "train", "--json", "--fresh", *words]
    variables = os.environ | {"PYTHONPATH": str(checkout)}
    begun = time.monotonic()
    process = subprocess.Popen(
        command, cwd=checkout, env=variables, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event.get("event") == "starting":
                yield time.monotonic() - begun, event["stage"]
            elif event.get("event") == "started":
                yield time.monotonic() - begun, "started"
                break
    finally:
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        process.wait()


def stages(events: Iterable[tuple[float, str]]) -> dict[str, float]:
    """Seconds by stage, and `total`. What is between two stages counts for the one before."""
    found: dict[str, float] = defaultdict(float)
    last_s, stage = 0.0, BEFORE_RANKS
    for at_s, name in events:
        found[stage] += at_s - last_s
        last_s, stage = at_s, name or stage
    if stage != "started":
        raise RuntimeError("the run ended before its first step: see what it has said above")
    return dict(found) | {"total": last_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkout", type=Path, action="append", help="default: this one")
    results_file = provenance.ROOT / "benchmarks/results/startup.json"
    parser.add_argument("--out", type=Path, default=results_file)
    arguments = parser.parse_args()
    checkouts = [one.resolve() for one in arguments.checkout or [provenance.ROOT]]
    measured: dict[Path, list[dict[str, float]]] = {one: [] for one in checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        words = demo_run(Path(scratch))
        for number in range(arguments.rounds):
            for checkout in checkouts if number % 2 == 0 else reversed(checkouts):
                measured[checkout].append(stages(events_of(checkout, words)))
    results = []
    for checkout, rounds in measured.items():
        names = sorted({name for one in rounds for name in one}, key=list(rounds[0]).index)
        medians = {name: statistics.median(one.get(name, 0.0) for one in rounds) for name in names}
        results.append({"medians_s": medians, "rounds_s": rounds})
        print(checkout.name, *(f"{name} {medians[name]:.1f} s" for name in names), sep="  ")
    provenance.write(arguments.out, {"checkouts": results}, device=torch.device("cpu"), features=())


if __name__ == "__main__":
    main()
