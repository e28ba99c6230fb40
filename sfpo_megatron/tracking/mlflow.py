"""The sink `mlflow`: the server that MLFLOW_TRACKING_URI names, or a database in RUN/mlflow.

mlflow names its runs itself: a run that is resumed is found there by the tag with our run id.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from sfpo_megatron.tracking.details import COLUMNS, Details
from sfpo_megatron.tracking.settings import Setting, settings
from sfpo_megatron.tracking.sinks import Metrics, RunInfo, is_failing

_TAG = "sfpo_run_id"
_PARAMS_A_CALL = 100
_MAX_PARAM_CHARS = 500


class MlflowSink:
    """Metrics by the names in metrics.jsonl, the config as params and as a file."""

    def __init__(self, run: RunInfo) -> None:
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if not server:
            run.directory.mlflow.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(server or f"sqlite:///{run.directory.mlflow}/mlflow.db")
        artifacts = None if server else (run.directory.mlflow / "artifacts").as_uri()
        found = self._find_or_create(run, artifacts)
        self._run_id = found.info.run_id
        self._log_params(settings(run.config), known=found.data.params)
        if run.directory.config.exists():
            self._client.log_artifact(self._run_id, str(run.directory.config))
        self._progress: list[str] = []

    def log(self, metrics: Metrics) -> None:
        now, step = int(time.time() * 1000), int(metrics["step"] or 0)
        found = [
            Metric(_key(name), float(value), now, step)
            for name, value in metrics.items()
            if name != "step" and value is not None
        ]
        self._client.log_batch(self._run_id, metrics=found)

    def text(self, line: str) -> None:
        self._progress.append(line)

    def details(self, details: Details) -> None:
        if details.samples:
            table = {"columns": list(COLUMNS), "data": details.rows()}
            file = f"samples/step-{details.step:06}.json"
            self._client.log_dict(self._run_id, table, file)

    def close(self) -> None:
        self._client.log_text(self._run_id, "\n".join(self._progress), "progress.txt")
        self._client.set_terminated(self._run_id, "FAILED" if is_failing() else "FINISHED")

    def _find_or_create(self, run: RunInfo, artifacts: str | None) -> Run:
        """The run with our id, running again, or a new one."""
        name = run.config.tracking.project
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            experiment_id = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        same = f"tags.{_TAG} = '{run.run_id}'"
        if run.run_id and (runs := self._client.search_runs([experiment_id], same)):
            self._client.update_run(runs[0].info.run_id, status="RUNNING")
            return runs[0]
        tags = {_TAG: run.run_id} if run.run_id else {}
        return self._client.create_run(experiment_id, tags=tags, run_name=run.name)

    def _log_params(self, found: Mapping[str, Setting], *, known: Mapping[str, str]) -> None:
        """Params that are not there yet: mlflow refuses to change one; config.yaml has them all."""
        params = [
            Param(_key(name), str(value)[:_MAX_PARAM_CHARS])
            for name, value in found.items()
            if _key(name) not in known
        ]
        for at in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=params[at : at + _PARAMS_A_CALL])


def _key(name: str) -> str:
    """A name without the characters that mlflow refuses."""
    return re.sub(r"[^\w. :/-]", "_", name)
