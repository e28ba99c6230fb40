"""What a run is at, how long it still takes, and what engines say while they start: no screen."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sfpo_megatron.host.progress import advance, counted, is_observed
from sfpo_megatron.host.spans import span
from sfpo_megatron.host.start_stages import begin_stage, stage_in
from sfpo_megatron.rollout.reports import FleetProgress, RolloutCount
from sfpo_megatron.rollout.root_cause import EngineLog
from sfpo_megatron.tracking.activity import Activity
from sfpo_megatron.tracking.pace import Pace, clock


def test_activity_follows_spans_and_counts() -> None:
    activity = Activity()
    assert not is_observed()
    with activity.watching():
        assert is_observed() and activity.now.is_start
        with span("engines"), span("snapshot"):
            assert activity.now.label == "waiting for the engines"
        with span("step", step=1):
            with span("sfpo"):
                since = activity.now.since
                with span("passes", number=3, of=4):
                    seen = [
                        (activity.now.part, activity.now.done, activity.now.total)
                        for _ in counted("minibatches", "ab")
                    ]
                    assert seen == [(2, 0, 2), (2, 1, 2)] and activity.now.done == 2
                    assert activity.now.label == "pass 3/4" and activity.now.since == since
            assert activity.now.label == "training" and activity.now.total == 0
            assert activity.now.step == 1
        assert not activity.now.is_start  # for good
        with span("evaluate"):
            pass
        assert (activity.now.label, activity.now.step) == ("between steps", 1)
    advance("rollouts", 1, 2)
    assert not is_observed() and activity.now.total == 0


def test_activity_of_other_threads_is_not_shown() -> None:
    activity = Activity()

    def other() -> None:
        with span("build"):
            advance("minibatches", 1, 2)

    with activity.watching():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert activity.now.label == "starting" and activity.now.total == 0


def test_time_left_is_by_medians_and_counts_evaluations() -> None:
    """One slow step, such as one that a checkpoint was written in, changes nothing. Step 40 of 100
    with an evaluation every 20 has 60 steps and four evaluations to go, that of 40 included."""
    pace = Pace(100, 20)
    pace.evaluated(0, 5.0)
    assert pace.left_s is None
    now = 1000.0
    for step in range(1, 41):
        now += 60.0 if step == 35 else 2.0
        pace.stepped(step, now)
        if step == 1:
            assert pace.left_s is None  # it also warms up
        if step == 20:
            pace.evaluated(20, 5.0)
            now += 5.0
    assert pace.left_s == 60 * 2.0 + 4 * 5.0
    pace.evaluated(40, 5.0)
    assert pace.left_s == 60 * 2.0 + 3 * 5.0
    assert clock(3661.4) == "1:01:01"


@pytest.mark.parametrize(
    ("num_steps", "every", "step", "wanted"),
    [(10, 3, 5, 3), (10, 3, 9, 2), (10, 3, 10, 1), (10, 0, 1, 1), (9, 3, 9, 1), (9, 3, 4, 2)],
)
def test_evaluations_to_come(num_steps: int, every: int, step: int, wanted: int) -> None:
    """Every `every` steps and after the last one."""
    pace = Pace(num_steps, every)
    pace.evaluated(0, 1.0)
    pace.stepped(step - 1, 0.0)
    pace.stepped(step, 0.0)
    assert pace.left_s == wanted


def test_stages_of_an_engine_are_in_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only this start counts: the log has those of earlier ones as well."""
    file = tmp_path / "engine-0.log"
    begin_stage("loading weights")
    file.write_text(capfd.readouterr().err)
    log = EngineLog(file)
    assert stage_in(log.text()) == ""
    begin_stage("importing vLLM")
    begin_stage("loading weights")
    with file.open("a") as stream:
        stream.write(f"a line of vLLM's\n{capfd.readouterr().err}and another")
    assert stage_in(log.text()) == "loading weights"


def test_many_engines_are_named_in_a_few_words() -> None:
    starting = tuple(f"engine {index} is loading weights" for index in range(3))
    progress = FleetProgress(count=RolloutCount(), starting=starting)
    assert progress.note == "engine 0 is loading weights, and 2 more"
