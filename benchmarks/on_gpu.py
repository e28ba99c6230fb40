"""`make gpu`: what the code does on one CUDA device, in stages that need more and more.

    python benchmarks/on_gpu.py --results DIR [--device cpu|cuda] [--only NAME,NAME]

Needs torch, megatron-core and this checkout; a stage that needs more says so and is left out. Each
runs in a process of its own under a time limit and has a row in DIR/on_gpu.json, which is written
after each: a run that is cut off keeps the rows that it had. With --device cpu the same stages run
small, on a CPU: that shows that they run, not what they are for.

Exit code 1 if a stage failed or took too long.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance

Status: TypeAlias = Literal["passed", "failed", "too long", "left out"]
_LAST_LINES = 15
_CPU_PATIENCE = 5
"""Times as long as on a GPU, where nobody lends the machine by the minute."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Stage:
    """One thing to be shown."""

    name: str
    limit_s: float
    module: str = ""
    """MODULE:FUNCTION of benchmarks/device_stages/: a function of the device that returns figures
    and raises where they are not what they should be."""
    script: tuple[str, ...] = ()
    """A benchmark of its own with its arguments; --device and --out are added."""
    small: tuple[str, ...] = ()
    """Arguments in their place on a CPU."""
    needs: tuple[str, ...] = ()
    """Packages that it needs beside torch and megatron-core."""
    features: tuple[str, ...] = ()
    """Keys of tools/verified_features.txt that it shows."""


_TRAINS = ("safetensors",)
"""What a stage needs that trains: its model is in a file of that form."""
STAGES = (
    Stage(
        name="training",
        limit_s=75,
        module="training:run",
        needs=_TRAINS,
        features=("plain-trainer", "bf16", "nccl"),
    ),
    Stage(
        name="snapshots",
        limit_s=150,
        script=("sfpo_overhead.py", "--sizes", "100M,500M,7B", "--budget-s", "3", "--steps", "5"),
        small=("--sizes", "1M", "--budget-s", "0.5", "--steps", "2", "--memory-size", "1M"),
        needs=("transformers",),  # makes the model of the train steps
        features=("overhead", "host-snapshot"),
    ),
    Stage(
        name="logprobs",
        limit_s=80,
        script=("logprobs.py", "--budget-s", "2"),
        small=("--budget-s", "0.1"),
        features=("logprobs",),
    ),
    Stage(
        name="offload",
        limit_s=35,
        module="offloading:run",
        needs=_TRAINS,
        features=("offload",),
    ),
    Stage(name="ipc", limit_s=25, module="ipc_bucket:run"),
    Stage(
        name="fork",
        limit_s=35,
        module="forked_writer:run",
        needs=_TRAINS,
        features=("checkpoint-async",),
    ),
    Stage(
        name="te",
        limit_s=80,
        module="te:run",
        needs=("transformer_engine", *_TRAINS),
        features=("te",),
    ),
    Stage(
        name="engines",
        limit_s=240,
        module="engines:run",
        needs=("vllm", "ray"),
        features=("colocated", "refit-shm", "refit-ipc"),
    ),
)
"""In the order of what they need. Their limits add up to twelve minutes, eight without those of
`engines`, which starts four of them."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Row:
    """What became of a stage."""

    stage: str
    status: Status
    seconds: float
    limit_s: float
    figures: dict[str, Any]
    error: str
    """The last lines that it printed, or why it was left out."""


def run_stage(stage: Stage, device: torch.device) -> Row:
    """Run one stage in a process group of its own."""
    limit_s = stage.limit_s * (1 if device.type == "cuda" else _CPU_PATIENCE)
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if missing:
        return _row(stage, "left out", 0.0, limit_s, {}, f"needs {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        begun = time.monotonic()
        with Path(folder, "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command_of(stage, device, out),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            status: Status = "failed"
            try:
                status = "passed" if process.wait(limit_s) == 0 and out.exists() else "failed"
            except subprocess.TimeoutExpired:
                status = "too long"
            finally:
                _end(process)
            log.seek(0)
            text = log.read()
        seconds = time.monotonic() - begun
        print(text, end="", flush=True)
        figures = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    lines = "" if status == "passed" else "\n".join(text.splitlines()[-_LAST_LINES:])
    return _row(stage, status, seconds, limit_s, figures, lines)


def _row(
    stage: Stage, status: Status, seconds: float, limit_s: float, figures: Any, error: str
) -> Row:
    return Row(
        stage=stage.name,
        status=status,
        seconds=round(seconds, 2),
        limit_s=limit_s,
        figures=figures,
        error=error,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the stage's processes, whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def command_of(stage: Stage, device: torch.device, out: Path) -> list[str]:
    """How a stage is run; its figures go into `out`."""
    here = Path(__file__).resolve()
    if stage.module:
        return [
            *(sys.executable, str(here), "--run-stage", stage.name),
            *("--device", device.type, "--out", str(out)),
        ]
    script, *arguments = stage.script
    given = arguments if device.type == "cuda" else stage.small
    return [
        *(sys.executable, str(here.parent / script), *given),
        *("--device", device.type, "--out", str(out)),
    ]


def run_here(name: str, device: torch.device, out: Path) -> None:
    """Run a stage in this process; its figures into `out`."""
    (stage,) = (stage for stage in STAGES if stage.name == name)
    module, _, function = stage.module.partition(":")
    run: Callable[[torch.device], dict[str, Any]] = getattr(
        importlib.import_module(f"benchmarks.device_stages.{module}"), function
    )
    out.write_text(json.dumps(run(device)), encoding="utf-8")


def write_rows(file: Path, rows: Sequence[Row], device: torch.device) -> None:
    """All rows so far with their provenance. The features of stages that passed count on a GPU
    alone."""
    passed = {row.stage for row in rows if row.status == "passed"}
    features = [f for s in STAGES if s.name in passed and device.type == "cuda" for f in s.features]
    provenance.write(file, {"rows": [asdict(r) for r in rows]}, device=device, features=features)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--results", type=Path, help="folder for on_gpu.json")
    parser.add_argument("--only", help="names of stages, by comma")
    parser.add_argument("--run-stage", choices=[s.name for s in STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.results is None and args.run_stage is None:
        parser.error("--results: found none, expected a folder for on_gpu.json")
    return args


def main() -> int:
    args = parse_args()
    device = torch.device(args.device)
    if args.run_stage:
        run_here(args.run_stage, device, args.out)
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `_end`
    wanted = args.only.split(",") if args.only else [stage.name for stage in STAGES]
    rows: list[Row] = []
    for stage in STAGES:
        if stage.name in wanted:
            rows.append(run_stage(stage, device))
            print(f"{stage.name}: {rows[-1].status} in {rows[-1].seconds:.1f} s", flush=True)
            write_rows(args.results / "on_gpu.json", rows, device)
    return int(any(row.status in ("failed", "too long") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
