"""Sinks and timers: what is written, when, and in which form."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from sfpo_megatron.tracking.sinks import ConsoleSink, Tracker
from sfpo_megatron.tracking.timers import Timers

STEP = {"reward_mean": 0.5, "accuracy": 0.25, "entropy": 1.0, "grad_norm": 3.0, "num_passes": 4}


def run_config(folder: Path, **tracking: Any) -> RunConfig:
    return RunConfig(
        output_dir=str(folder),
        model=ModelConfig(path="model"),
        data=DataConfig(train=(DataSource(source="jsonl", path="x.jsonl"),)),
        train=TrainConfig(num_steps=20),
        tracking=TrackingConfig(**tracking),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines_are_there_before_close(tmp_path: Path) -> None:
    """A killed run keeps every line: each is in the file as soon as `log` returns."""
    tracker = Tracker(run_config(tmp_path / "run", sinks=("jsonl",)))
    tracker.log({"step": 1, "loss": 0.5, "sfpo_active": True})
    assert lines(tmp_path / "run/metrics.jsonl") == [{"step": 1, "loss": 0.5, "sfpo_active": True}]
    tracker.log({"step": 2, "loss": 0.25, "sfpo_active": False})
    assert [line["step"] for line in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    tracker.close()


def test_not_finite_is_null_and_scalars_are_numbers(tmp_path: Path) -> None:
    """NaN is not JSON; torch and numpy scalars are not either."""
    with Tracker(run_config(tmp_path, sinks=("jsonl",))) as tracker:
        tracker.log(
            {
                "step": 1,
                "a": float("nan"),
                "b": float("inf"),
                "c": np.float32(0.5),
                "d": np.int64(3),
            }
        )
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": None, "b": None, "c": 0.5, "d": 3}
    ]


def test_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with Tracker(run_config(tmp_path, sinks=("jsonl",))) as tracker:
            tracker.log({"step": step})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_is_not_a_metric_is_refused(tmp_path: Path) -> None:
    with Tracker(run_config(tmp_path, sinks=("jsonl",))) as tracker:
        with pytest.raises(TypeError, match="metric loss: found 'x', expected a number"):
            tracker.log({"step": 1, "loss": "x"})
        with pytest.raises(ValueError, match="without a step"):
            tracker.log({"loss": 1.0})
    assert lines(tmp_path / "metrics.jsonl") == []


def test_sinks_are_the_ones_configured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(run_config(tmp_path / "a", sinks=("jsonl",))) as tracker:
        tracker.log({"step": 1, **STEP})
        tracker.progress("hello")
    assert capsys.readouterr().out == ""
    with Tracker(run_config(tmp_path / "b", sinks=("console",)), "sft.jsonl") as tracker:
        tracker.log({"step": 1, **STEP})
        tracker.progress("hello")
    assert "reward  0.500" in capsys.readouterr().out
    assert not (tmp_path / "b").exists()


def test_console_lines_align_and_end_with_an_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step gives no pace; after it, remaining = pace x steps left."""
    clock = iter([100.0, 110.0, 190.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    sink = ConsoleSink(20, stream)
    for step in (1, 2, 10):
        sink.log({"step": step, **STEP, "grad_norm": 10.0**step})
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("step  1/20  reward  0.500  acc  0.250")
    assert "ETA" not in first
    assert second.endswith("ETA 0:03:00")  # 10 s a step, 18 left
    assert third.endswith("ETA 0:01:40")  # 90 s for 9 steps, 10 left
    assert second.index("ETA") == third.index("ETA")


def test_console_shows_evaluations_and_missing_values() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(20, stream)
    sink.log({"step": 0, "eval/accuracy": 0.25})
    sink.log({"step": 1, "reward_mean": None, "loss": 0.1})
    text = stream.getvalue()
    assert "step 0: held-out accuracy 0.250" in text
    assert "n/a" in text


def test_timers_add_up_and_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.5, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timers = Timers()
    with timers("passes"):
        pass
    with timers("passes"):
        pass
    with pytest.raises(RuntimeError), timers("refit"):
        raise RuntimeError  # the time until a failure counts
    assert timers.take() == {"time/passes_s": 3.5, "time/refit_s": 1.0}
    assert timers.take() == {}
