"""Sinks and timers: what is written, when, and in which form."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from made.configs import run_config

from sfpo_megatron.config.tree import (
    RunConfig,
    TrackingConfig,
)
from sfpo_megatron.host.unwinding import Unwound
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.metrics import read_metrics
from sfpo_megatron.outputs.starts import note_start
from sfpo_megatron.plugins import SINK, PluginError
from sfpo_megatron.tracking.console import ConsoleSink
from sfpo_megatron.tracking.sinks import RunInfo
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.tracking.tracker import NoTracker, Tracker

STEP = {"reward_mean": 0.5, "accuracy": 0.25, "entropy": 1.0, "grad_norm": 3.0, "num_passes": 4}


def config_of(folder: Path, **tracking: Any) -> RunConfig:
    return run_config(output_dir=str(folder), train={"num_steps": 20}, tracking=tracking)


def run_info(folder: Path = Path("run")) -> RunInfo:
    return RunInfo(config=config_of(folder), directory=RunDirectory.of(folder), num_steps=20)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines_are_there_before_close(tmp_path: Path) -> None:
    """A killed run keeps every line: each is in the file as soon as `log` returns."""
    tracker = Tracker(config_of(tmp_path / "run", sinks=("jsonl",)))
    tracker.log({"step": 1, "loss": 0.5, "sfpo_active": True})
    assert lines(tmp_path / "run/metrics.jsonl") == [{"step": 1, "loss": 0.5, "sfpo_active": True}]
    tracker.log({"step": 2, "loss": 0.25, "sfpo_active": False})
    assert [line["step"] for line in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    tracker.close()


def test_not_finite_is_null_and_scalars_are_numbers(tmp_path: Path) -> None:
    """NaN is not JSON; torch and numpy scalars are not either."""
    with Tracker(config_of(tmp_path, sinks=("jsonl",))) as tracker:
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
        with Tracker(config_of(tmp_path, sinks=("jsonl",))) as tracker:
            tracker.log({"step": step})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_is_not_a_metric_is_refused(tmp_path: Path) -> None:
    with Tracker(config_of(tmp_path, sinks=("jsonl",))) as tracker:
        with pytest.raises(TypeError, match="metric loss: found 'x', expected a number"):
            tracker.log({"step": 1, "loss": "x"})
        with pytest.raises(ValueError, match="without a step"):
            tracker.log({"loss": 1.0})
    assert lines(tmp_path / "metrics.jsonl") == []


def test_sinks_are_the_ones_configured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(config_of(tmp_path / "a", sinks=("jsonl",))) as tracker:
        tracker.log({"step": 1, **STEP})
        tracker.progress("hello")
    assert capsys.readouterr().out == ""
    with Tracker(config_of(tmp_path / "b", sinks=("console",))) as tracker:
        tracker.log({"step": 1, **STEP})
        tracker.progress("hello")
    assert "reward  0.500" in capsys.readouterr().out
    assert not (tmp_path / "b").exists()


def test_console_lines_align_and_end_with_an_eta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step gives no pace; after it, remaining = pace x steps left."""
    sink = ConsoleSink(run_info())
    for step, now in ((1, 100.0), (2, 110.0), (10, 190.0)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        sink.log({"step": step, **STEP, "grad_norm": 10.0**step})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step  1/20  reward  0.500  acc  0.250")
    assert "ETA" not in first
    assert second.endswith("ETA 0:03:00")  # 10 s a step, 18 left
    assert third.endswith("ETA 0:01:40")  # 90 s for 9 steps, 10 left
    assert second.index("ETA") == third.index("ETA")


def test_console_shows_evaluations_and_missing_values(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(run_info())
    sink.log({"step": 0, "eval/accuracy": 0.25})
    sink.log({"step": 1, "reward_mean": None, "loss": 0.1})
    text = capsys.readouterr().out
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


# ---- sinks of one's own, and sinks that fail -------------------------------------------------


class Recording:
    """A sink of a user's."""

    made: ClassVar[list[Recording]] = []

    def __init__(self, run: RunInfo) -> None:
        self.run, self.seen = run, []
        self.made.append(self)

    def log(self, metrics: Any) -> None:
        self.seen.append(dict(metrics))

    def text(self, line: str) -> None:
        self.seen.append(line)

    def close(self) -> None:
        self.seen.append("closed")


class Failing(Recording):
    """Raises in one of its methods, which the test names."""

    at = ""

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        self._raise("__init__")

    def _raise(self, method: str) -> None:
        if method == self.at:
            raise OSError(28, "No space left on device")

    def log(self, metrics: Any) -> None:
        self._raise("log")
        super().log(metrics)

    def text(self, line: str) -> None:
        self._raise("text")
        super().text(line)

    def close(self) -> None:
        self._raise("close")
        super().close()


def test_a_sink_of_ones_own_gets_all_of_it(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", sinks=("jsonl", f"{__name__}:Recording"))
    Recording.made.clear()
    with Tracker(config, num_steps=7) as tracker:
        tracker.log({"step": 1, "loss": float("nan")})
        tracker.progress("hello")
    (sink,) = Recording.made
    assert sink.seen == [{"step": 1, "loss": None}, "hello", "closed"]
    assert sink.run.num_steps == 7 and sink.run.config is config
    assert sink.run.directory.path == tmp_path / "run"
    assert lines(tmp_path / "run/metrics.jsonl") == [{"step": 1, "loss": None}]


@pytest.mark.parametrize("method", ["__init__", "log", "text", "close"])
def test_a_sink_that_raises_is_named_once_and_left_out(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other sinks get everything; whatever it had before it failed stays with it."""
    monkeypatch.setattr(Failing, "at", method)
    Recording.made.clear()
    name = f"{__name__}:Failing"
    with Tracker(config_of(tmp_path, sinks=(name, "jsonl"))) as tracker:
        for step in (1, 2):
            tracker.progress("hello")
            tracker.log({"step": step})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    said = capsys.readouterr().err
    assert said == (
        f"warning: tracking.sinks: {name} failed and gets nothing more "
        "(OSError: [Errno 28] No space left on device)\n"
    )
    seen = {"__init__": [], "log": ["hello"], "text": []}
    if method in seen:
        assert Recording.made[0].seen == seen[method]
    else:
        assert len(Recording.made[0].seen) == 4


class Signalled(Recording):
    """Is at work when a signal comes."""

    def log(self, metrics: Any) -> None:
        raise Unwound(143)


def test_a_signal_in_a_sink_still_ends_the_run(tmp_path: Path) -> None:
    tracker = Tracker(config_of(tmp_path, sinks=(f"{__name__}:Signalled",)))
    with tracker, pytest.raises(Unwound):
        tracker.log({"step": 1})


class Greedy(Recording):
    """Takes apart what it is given."""

    def log(self, metrics: Any) -> None:
        super().log(metrics)
        metrics.clear()


class LogsOnly:
    """Half a sink."""

    def __init__(self, run: RunInfo) -> None: ...

    def log(self, metrics: Any) -> None: ...


def test_a_sink_may_change_what_it_is_given(tmp_path: Path) -> None:
    metrics = {"step": 1, "loss": 0.5}
    with Tracker(config_of(tmp_path, sinks=(f"{__name__}:Greedy", "jsonl"))) as tracker:
        tracker.log(metrics)
    assert lines(tmp_path / "metrics.jsonl") == [metrics] == [{"step": 1, "loss": 0.5}]


def test_a_full_disk_leaves_whole_lines_and_says_where_they_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit on the size of files for a disk: what fits of a line is written, then no more.
    The table at the end of the run reads the file. Not exercised: a disk that says so at close."""
    line_bytes, cut_bytes = len('{"step": 1, "num_rollouts": 8, "loss": 0.5}\n'), 10
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(config_of(tmp_path / "run", sinks=("jsonl",))) as tracker:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * line_bytes + cut_bytes, limits[1]))
        try:
            for step in range(1, 7):
                tracker.log({"step": step, "num_rollouts": 8, "loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file = tmp_path / "run/metrics.jsonl"
    assert [line["step"] for line in read_metrics(file).train] == [1, 2, 3]
    assert file.stat().st_size == 3 * line_bytes
    said = capsys.readouterr().err
    assert said.startswith("warning: tracking.sinks: jsonl failed and gets nothing more (OSError: ")
    assert said.endswith(f"File too large; {file} ends before the line of step 4)\n")
    assert said.count("\n") == 1


def test_a_start_that_a_full_disk_cuts_short_leaves_whole_lines(tmp_path: Path) -> None:
    """Half a line would run into that of the next start, and no report could be made."""
    run = RunDirectory.of(tmp_path)
    note_start(run, run_id="a", after_step=0)
    whole, limits = run.environment.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"environment\.jsonl ends before this line"):
            note_start(run, run_id="a", after_step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.environment.read_bytes() == whole


def test_a_closed_console_ends_no_run(tmp_path: Path) -> None:
    """A pipe such as `train | head -1`: its reader is gone after a line, the metrics are all there,
    and the run ends with exit code 0."""
    code = (
        "import json, sys; sys.path[:0] = sys.argv[2:4]\n"
        "from made.configs import run_config\n"
        "from sfpo_megatron.tracking.tracker import Tracker\n"
        "with Tracker(run_config(output_dir=sys.argv[1], train={'num_steps': 20})) as tracker:\n"
        "    for step in range(1, 6):\n"
        "        tracker.log({'step': step, **json.loads(sys.argv[4])})\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        paths = [str(folder) for folder in Path(__file__).parents[1:3]]
        command = [sys.executable, "-c", code, str(tmp_path), *paths, json.dumps(STEP)]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "console failed and gets nothing more (BrokenPipeError: " in done.stderr
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_other_ranks_track_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with NoTracker() as tracker:
        tracker.log({"step": 1, "loss": 0.5})
        tracker.progress("hello")
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module:Sink", "does not import"),
        (f"{__name__}:Nothing", "nothing that can be called 'Nothing'"),
        (f"{__name__}:lines", None),  # one parameter: it can be called so
        (f"{__name__}:config_of", None),
        ("json:dump", "cannot be called with (run)"),
    ],
)
def test_a_sink_that_cannot_be_loaded_ends_the_run(
    name: str, expected: str | None, tmp_path: Path
) -> None:
    """Before anything starts; `check` says the same without an import, where the source tells."""
    if expected is None:
        SINK.load(name)
        return
    with pytest.raises(PluginError, match=r"tracking\.sinks: found") as found:
        Tracker(config_of(tmp_path, sinks=(name,)))
    assert expected in str(found.value)
    with pytest.raises(PluginError, match=r"tracking\.sinks: found"):
        SINK.find(name)


def test_half_a_sink_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", sinks=("jsonl", f"{__name__}:LogsOnly"))
    with pytest.raises(PluginError, match=r"LogsOnly without text\(self, line\) and close\(self\)"):
        Tracker(config)
    assert not (tmp_path / "run").exists()


def test_each_sink_once_and_by_a_known_name() -> None:
    with pytest.raises(ValueError, match="each sink once"):
        TrackingConfig(sinks=("jsonl", "jsonl"))
    with pytest.raises(ValueError, match=r"one of console, jsonl, .*, or package\.module:name"):
        TrackingConfig(sinks=("tensorbaord",))


def test_the_example_is_a_sink(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", sinks=("jsonl", "examples.your_own.sink:Csv"))
    with Tracker(config) as tracker:
        tracker.log({"step": 1, **STEP})
        tracker.log({"step": 1, "eval/accuracy": 0.5})
    assert (tmp_path / "run/reward.csv").read_text() == "1,0.5\n"
