"""Runs that write to tensorboard, wandb or mlflow, and what is then read back with the libraries.

    PYTHON services.py write OUTPUT_DIR SINK,SINK STEP,STEP CONTINUED_STEP [ERROR]
    PYTHON services.py read OUTPUT_DIR SINK

PYTHON is one with the libraries: `make_venv` makes it.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN_ID = "0123abcd4567"
EVERYTHING = {"tensors": 0, "scalars": 0, "histograms": 0}
BEST = {0: 0.1, 2: 0.25, 4: 0.5}
"""Step -> held-out accuracy."""


def make_venv(folder: Path, *extras: str) -> Path:
    """A Python with the libraries of these extras of setup.py beside all that this one has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path(inside.stdout.strip(), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    from distutils.core import run_setup

    import setuptools  # noqa: F401  (brings distutils to Python 3.12)

    here = Path.cwd()
    os.chdir(ROOT)
    try:
        brought = run_setup("setup.py", stop_after="init").extras_require
    finally:
        os.chdir(here)
    libraries = [library for extra in extras for library in brought[extra]]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    subprocess.run([*pip, "--no-warn-conflicts", *libraries], check=True)
    return python


def run(python: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """This file as a script; a service that needs more than a minute hangs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW"))}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.run(
        [python, __file__, *arguments],
        env=environment | {"PYTHONPATH": path} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- write ----------------------------------------------------------------------------------


def write(
    output_dir: str, sinks: str, steps: str, continued_step: str, error: str | None = None
) -> None:
    """One start of a run: its lines, samples and text. `error` ends it."""
    from made.configs import run_config

    from sfpo_megatron.run.continuing import prepare_output
    from sfpo_megatron.tracking.details import Details, Sample, SampledResponse
    from sfpo_megatron.tracking.tracker import Tracker

    config = run_config(
        output_dir=output_dir,
        tracking={"sinks": tuple(sinks.split(",")), "project": "tried"},
        train={"num_steps": 4},
    )
    prepare_output(config, up_to_step=int(continued_step))
    with Tracker(config, run_id=RUN_ID, continued_step=int(continued_step)) as tracker:
        for step in map(int, steps.split(",")):
            if step:
                attempt = 10.0 * int(continued_step)  # another value than that of the first start
                line = {"loss": step + attempt, "nothing": float("nan"), "sfpo_active": True}
                tracker.log({"step": step, "reward_mean": 0.5, **line, "pass_1/loss": 1.0})
                one = SampledResponse(
                    text="4 é\n2", reward=1.0, correct=True, finished=True, num_tokens=3
                )
                asked = Sample(prompt_id="p/1", prompt="6*7=", answer="42", responses=(one,))
                lengths = {"response_tokens": [1.0, 2.0, 3.0]}
                tracker.details(Details(step=step, distributions=lengths, samples=(asked,)))
            if step in BEST:
                tracker.log({"step": step, "eval/accuracy": BEST[step]})
        tracker.progress("the table\n  at the end")
        if error is not None:
            raise RuntimeError(error)


# ---- read -----------------------------------------------------------------------------------


def read_tensorboard(output_dir: Path) -> dict[str, Any]:
    """What TensorBoard shows of each run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = {}
    for folder in (output_dir / "tensorboard").iterdir():
        events = EventAccumulator(str(folder), size_guidance=EVERYTHING).Reload()
        plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
        start = HParamsPluginData.FromString(plugin.content).session_start_info
        tags = events.Tags()
        found[folder.name] = {
            "scalars": {
                tag: {event.step: event.value for event in events.Scalars(tag)}
                for tag in tags["scalars"]
            },
            "texts": {
                tag.removesuffix("/text_summary"): [
                    event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)
                ]
                for tag in tags["tensors"]
                if tag.endswith("text_summary")
            },
            "histograms": {
                tag: [event.histogram_value.num for event in events.Histograms(tag)]
                for tag in tags["histograms"]
            },
            "lr": start.hparams["train.optimizer.lr"].number_value,
            "output_dir": start.hparams["output_dir"].string_value,
        }
    return found


def read_wandb(output_dir: Path) -> list[dict[str, Any]]:
    """Each start's run: id, config, history and files."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((output_dir / "wandb").glob("offline-run-*/*.wandb")):
        started: dict[str, Any] = {"history": [], "files": []}
        for data in records(file):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                started |= {"id": record.run.run_id, "project": record.run.project}
                started["name"] = record.run.display_name
                config = {item.key: item.value_json for item in record.run.config.update}
                started["lr"] = json.loads(config["train.optimizer.lr"])
            elif kind == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                started["history"].append(row)
            elif kind == "exit":
                started["exit"] = record.exit.exit_code
        files = file.parent / "files"
        started["files"] = {
            path.relative_to(files).as_posix(): path.read_text(encoding="utf-8")
            for path in files.rglob("*")
            if path.is_file()
        }
        found.append(started)
    return found


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, whole, block = file.read_bytes(), 7, b"", 2**15
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for a header: the block is padded
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield whole


def read_mlflow(output_dir: Path) -> list[dict[str, Any]]:
    """Each run of the local store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_dir}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("tried")
    found = []
    for one in client.search_runs([experiment.experiment_id]):
        run_id = one.info.run_id
        tables = client.list_artifacts(run_id, "samples")
        files = [*client.list_artifacts(run_id), *tables]
        found.append(
            {
                "id": one.data.tags["sfpo_run_id"],
                "name": one.info.run_name,
                "status": one.info.status,
                "lr": one.data.params["train.optimizer.lr"],
                "metrics": {
                    key: [[m.step, m.value] for m in client.get_metric_history(run_id, key)]
                    for key in one.data.metrics
                },
                "files": {
                    file.path: Path(client.download_artifacts(run_id, file.path)).read_text()
                    for file in files
                    if not file.is_dir
                },
            }
        )
    return found


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}

if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    if action == "write":
        write(*rest)
    else:
        print(json.dumps(READ[rest[1]](Path(rest[0]))))
