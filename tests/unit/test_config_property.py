"""Run configs with any values anywhere: `check` refuses in one line, or the run does what it says.

Not exercised: engines and services; rollouts of more than one rank.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from digits import VOCABULARY
from hypothesis import event, example, given, settings
from hypothesis.internal.conjecture import providers
from made import warm_run
from made.run_variants import run_yaml, variants, write_files

from sfpo_megatron import cli
from sfpo_megatron.config.load import dump_config, load_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.gate import EntropyGate
from sfpo_megatron.mcore.schedule import sft_schedule, train_schedule
from sfpo_megatron.plugins import ADVANTAGE, REWARD, SINK
from sfpo_megatron.run.learner import objective_of

BAD_ROWS = re.compile(r"[0-9]+ bad rows \(.+\)(?:, the first [0-9]+ above)?: ")
"""How a report of several bad rows ends."""
MOST_CPU_S = 20
"""What a command may compute on a config before it counts as hanging."""
ENOUGH_ROWS = 1000
MOST_RUNS = 25
"""Runs of one process: each leaves 50 threads of its gloo groups behind, which poll."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with all files that run.yaml may name; a home directory of its own."""
    place = tmp_path_factory.mktemp("variants")
    tiny.make_model(place / "made", vocabulary=VOCABULARY, layers=1)
    (place / "home").mkdir()
    (place / "work").mkdir()
    write_files(place / "work", place / "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "work")
        patch.setenv("HOME", str(place / "home"))
        patch.setattr("sfpo_megatron.config.check.has_cuda", lambda: False)
        # Else examples depend on the source of whatever other files of tests have imported.
        patch.setattr(providers, "_get_local_constants", providers.Constants)
        for name in ("RAY_ADDRESS", "SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield place / "work"


def said(*command: str) -> tuple[int, str, str]:
    """Exit code and both outputs of one of our commands, within its time."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"{command} has computed for {MOST_CPU_S} s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*command])
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return code, out.getvalue(), err.getvalue()


def is_refused(*command: str) -> bool:
    """Whether a command refuses, in the one line of all refusals, or a line for each bad row and
    one of all; else it succeeds."""
    code, _, err = said(*command)
    if code == 0:
        return False
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and lines and lines[0].startswith("error: "), err
    if len(lines) > 1:
        assert "--data" in command and BAD_ROWS.match(lines.pop()), err
        assert all(line.removeprefix("error: ").startswith("data.") for line in lines), err
    for line in lines:
        assert "found " in line and ", expected " in line and "; " in line, line
    return True


def build(config: RunConfig) -> None:
    """What a run makes of its config before there are ranks."""
    objective_of(config)
    ADVANTAGE.load(config.objective.advantage)
    EntropyGate.of(config.sfpo)
    for one in config.reward.functions(config.rewards):
        REWARD.load(one.name)
    for sink in config.tracking.sinks:
        SINK.load(sink)
    if config.train.num_steps is not None:
        train_schedule(config.train)
    if config.sft.num_steps is not None:
        sft_schedule(config.sft)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=variants())
@example(text=run_yaml([("data.train.0", 91)]))  # several rows are bad
def test_check_refuses_in_a_line_or_all_can_be_built(text: str, folder: Path) -> None:
    Path("run.yaml").write_bytes(text.encode())
    if is_refused("check", "run.yaml", "--world-size", "1"):
        event("refused")
        return
    event("accepted")
    config = load_config("run.yaml")
    Path("dumped.yaml").write_text(dump_config(config))
    assert load_config("dumped.yaml") == config
    build(config)
    if all((source.size or 0) < ENOUGH_ROWS for source in config.data.train):
        is_refused("check", "--data", "run.yaml", "--world-size", "1")
    is_refused("plan", "run.yaml")  # what runs on GPUs is refused more
    is_refused("slurm", "run.yaml", "--nodes=2", "--time=4:00:00", "--dry-run")


class Warm:
    """The process that trains one run after another, and another one after `MOST_RUNS`."""

    def __init__(self, place: Path) -> None:
        self._place, self._number = place, 0
        self._process = self._begin()

    def _begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, warm_run.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._place,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def answer(self, text: str) -> dict[str, Any]:
        """What became of a run of this config, in a folder of its own."""
        if self._number and self._number % MOST_RUNS == 0:
            self.close()
            self._process = self._begin()
        self._number += 1
        work = self._place / str(self._number) / "work"
        (work.parent / "home").mkdir(parents=True)
        work.mkdir()
        write_files(work, self._place / "made")
        (work / "run.yaml").write_bytes(text.encode())
        assert self._process.stdin is not None and self._process.stdout is not None
        print(work, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, (self._place / warm_run.LOG).read_text()[-4000:]
        return dict(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    place = tmp_path_factory.mktemp("warm")
    tiny.make_model(place / "made", vocabulary=VOCABULARY, layers=1)
    process = Warm(place)
    yield process
    process.close()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(text=variants())
def test_what_check_accepts_trains(text: str, warm: Warm) -> None:
    answer = warm.answer(text)
    assert "failed" not in answer, answer["error"]


@pytest.mark.full
@settings(max_examples=500, deadline=None)
@given(text=variants())
def test_what_check_accepts_trains_at_length(text: str, warm: Warm) -> None:
    answer = warm.answer(text)
    assert "failed" not in answer, answer["error"]
