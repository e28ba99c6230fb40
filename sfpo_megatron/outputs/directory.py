"""The directory of a run: every path that it writes, in one place.

    RUN/config.yaml          the config, every default filled in
    RUN/run.json             which run this is (checkpoints/identity.py); run.json.previous-N
    RUN/environment.jsonl    a line a start: host, hardware, versions (environment.py)
    RUN/metrics.jsonl        a line a train step and an evaluation; metrics.previous-N.jsonl
    RUN/samples.jsonl        sample rollouts; samples.previous-N.jsonl
    RUN/tensorboard/, RUN/wandb/, RUN/mlflow/
                             what these sinks write (docs/outputs.md)
    RUN/eval.jsonl           a line a model and run of `sfpo-megatron eval`
    RUN/eval/                its records and tables (docs/evaluation.md)
    RUN/plot.png             the picture of the run
    RUN/report.html          the page of the run (report/)
    RUN/hf/                  the policy, as Hugging Face files
    RUN/checkpoints/         see checkpoints/store.py
    RUN/logs/                rank_N.err, rank_N.json, rank_N.exit, controller.log, engine-N.log,
                             scoring-N.log
    RUN/slurm/               job scripts
    RUN/trace/               pictures of train steps (outputs/trace.py)
    RUN/stop-requested       asks the run to stop (outputs/stopping.py)
    RUN/.lock                who trains here, or did last (outputs/lock.py); .lock-heartbeat

Standard library only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of the run in `output_dir`. Nothing is made by naming it."""

    path: Path

    @staticmethod
    def of(output_dir: str | Path) -> RunDirectory:
        """The directory by its absolute path, so that a process elsewhere finds the same one.
        `load_config` has expanded `~` and variables."""
        return RunDirectory(Path(os.path.abspath(output_dir)))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """File that says which run this is."""
        return self.path / "run.json"

    @property
    def environment(self) -> Path:
        """File with a line for each start: where, and of which versions."""
        return self.path / "environment.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sample rollouts (tracking.samples)."""
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files: a folder a run in it, named by the run's id."""
        return self.path / "tensorboard"

    @property
    def mlflow(self) -> Path:
        """Folder of mlflow's database and artifacts, where no tracking server is set."""
        return self.path / "mlflow"

    @property
    def evals(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def eval(self) -> Path:
        """Folder of records and tables of `sfpo-megatron eval`."""
        return self.path / "eval"

    @property
    def plot(self) -> Path:
        return self.path / "plot.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def slurm(self) -> Path:
        return self.path / "slurm"

    @property
    def trace(self) -> Path:
        """Folder of pictures of train steps."""
        return self.path / "trace"

    @property
    def spans(self) -> Path:
        """Folder of what they are made of, there while they are (outputs/trace.py)."""
        return self.trace / "spans"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop-requested"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def heartbeat(self) -> Path:
        """File that stands for a lock where the file system has none."""
        return self.path / ".lock-heartbeat"

    @property
    def controller_log(self) -> Path:
        return self.logs / "controller.log"

    def engine_log(self, index: int) -> Path:
        """Log of engine number `index`."""
        return self.logs / f"engine-{index}.log"

    def scoring_log(self, index: int) -> Path:
        """Log of scoring process number `index`, a reward function's own output included."""
        return self.logs / f"scoring-{index}.log"

    def error_file(self, rank: int) -> Path:
        """File with the message of that rank on its first line and the traceback below."""
        return self.logs / f"rank_{rank}.err"

    def failure_file(self, rank: int) -> Path:
        """File in which that rank tells the launcher how it failed (launcher/failures.py)."""
        return self.logs / f"rank_{rank}.json"

    def exit_file(self, rank: int) -> Path:
        """File with the exit code of that rank, if it was not 0."""
        return self.logs / f"rank_{rank}.exit"

    def phase_file(self, rank: int) -> Path:
        """File that says what that rank is doing (host/phases.py)."""
        return self.logs / f"rank_{rank}.phase"

    def forget_ranks(self) -> None:
        """Remove what the ranks of an earlier run have left in `logs`, and make it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        for suffix in ("err", "json", "exit", "phase"):
            for old in self.logs.glob(f"rank_*.{suffix}"):
                old.unlink(missing_ok=True)
