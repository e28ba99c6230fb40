"""When a run saves, what it asks for around that, and which checkpoint is the best one.

Megatron's part of a checkpoint is an empty file; the store is real. With a real policy:
tests/dist/test_checkpoint.py, tests/e2e/test_resume.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from made.saved_runs import Saved, continued

from sfpo_megatron.checkpoints.store import Found
from sfpo_megatron.outputs.stopping import OutOfTime, StopRun
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.run.saving import read_run_state


def test_saved_every_so_often_and_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun ahead is taken in first, and the devices are the trainer's."""
    run = Saved(tmp_path, monkeypatch)
    assert run.checkpoints.resume() == 0
    for step in range(1, 6):
        run.events.clear()
        assert run.checkpoints.after_step(step, is_last=step == 5) is False
        wanted = ["hold", "to trainer", f"save {step}"] if step in (2, 4, 5) else []
        assert run.events[:3] == wanted, step
    assert list(run.store.steps()) == [2, 4, 5]


def test_saved_at_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Saved(tmp_path, monkeypatch)
    run.checkpoints.resume()
    assert run.begun == [True]
    run.stop.reason = "SIGTERM"
    assert run.checkpoints.after_step(3) is True
    assert list(run.store.steps()) == [3] and "stopped by SIGTERM" in run.events[-1]
    assert run.checkpoints.after_step(5, is_last=True) is False  # the run has ended by itself


@pytest.mark.parametrize("num_made", [0, 1])
def test_without_time_for_its_passes_a_step_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_made: int
) -> None:
    """Before the first pass the weights are those of the step before: they are saved, and the batch
    is kept for the next start. After it only the last checkpoint is whole."""
    run = Saved(tmp_path, monkeypatch, every=10, must_save_within_s=60.0)
    run.checkpoints.resume()
    left = iter([None] * num_made)

    def check(remaining_s: float) -> None:
        if next(left, "out of time"):
            raise OutOfTime("SIGUSR1")

    run.stop.check = check
    one_pass = run.checkpoints.guarded(run.note("pass"), step=5, num_passes=4)
    with pytest.raises(StopRun) as stop:
        for _ in range(4):
            one_pass()
    run.checkpoints.give_up(stop.value)
    if num_made:
        assert (
            run.events == ["pass", run.events[1]]
            and "last checkpoint is of step 0" in run.events[1]
        )
        assert not run.store.steps()
    else:
        assert run.events[:3] == ["hand back 5", "end", "save 4"]
        assert "stopped by SIGUSR1 after step 4, saved" in run.events[-1]
        assert list(run.store.steps()) == [4]


def test_a_stop_before_the_first_step_leaves_nothing_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Saved(tmp_path, monkeypatch)
    run.checkpoints.resume()
    run.checkpoints.give_up(StopRun("SIGUSR1", step=1, begun=False))
    assert "stopped by SIGUSR1 before the first train step: nothing to save" in run.events[-1]
    assert not run.store.steps()


def test_every_checkpoint_says_whose_weights_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are written by later starts too: the reference of a KL term would be another."""
    other = Found(directory=tmp_path / "other" / "iter_0000007", step=7, has_run_state=False)
    first = Saved(tmp_path / "run", monkeypatch, found=other)
    assert first.checkpoints.resume() == 0
    first.checkpoints.after_step(2)
    again = continued(first, tmp_path / "run", monkeypatch)
    again.checkpoints.after_step(4)
    states = map(read_run_state, again.store.steps().values())
    assert [state["began_from"] for state in states] == [str(other.directory)] * 2
    own = Saved(tmp_path / "own", monkeypatch)
    own.checkpoints.resume()
    own.checkpoints.after_step(2)
    assert read_run_state(own.store.steps()[2])["began_from"] is None


def lost(step: int) -> StopRun:
    """What `Engines` raises before train step `step`."""
    stop = StopRun("engine 0 died", step=step, begun=False)
    stop.__cause__ = FleetLost("engine 0 died")
    return stop


def test_lost_engines_without_anything_new_to_save_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 85 says that the run has got on, and that the same command continues."""
    first = Saved(tmp_path, monkeypatch)
    first.checkpoints.resume()
    with pytest.raises(FleetLost, match=r"^engine 0 died$"):
        first.checkpoints.give_up(lost(1))
    assert not first.store.steps()
    first.checkpoints.give_up(lost(4))
    assert list(first.store.steps()) == [3] and "after step 3, saved" in first.events[-1]
    again = continued(first, tmp_path, monkeypatch)
    with pytest.raises(FleetLost):
        again.checkpoints.give_up(lost(4))
    again.checkpoints.after_step(4)
    again.checkpoints.give_up(lost(5))  # saved already, by this start
    assert list(again.store.steps()) == [3, 4] and "after step 4, saved" in again.events[-1]


def test_all_of_a_save_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the training too: the last save before a stop is waited for to its end."""
    run = Saved(tmp_path, monkeypatch, async_save=True)
    run.checkpoints.resume()
    run.writing.seconds = 1000.0
    run.checkpoints.after_step(2)
    assert run.took == []
    monkeypatch.setattr(run.store, "prune", lambda: time.sleep(0.25))
    run.checkpoints.after_step(3)  # finds it written
    run.checkpoints.after_step(5, is_last=True)
    first, pruned, second, pruned_again = run.took
    assert 1000 < first < pruned and 1000.25 < pruned < 1100
    assert 1000.25 < second < 1100 and 1000.25 < pruned_again < 1100


def test_a_load_is_the_first_guess_at_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is asked to stop before its first save keeps time for one."""
    first = Saved(tmp_path, monkeypatch)
    assert first.checkpoints.resume() == 0 and first.took == []
    first.checkpoints.after_step(2)
    monkeypatch.setattr(Saved, "load_state_dict", lambda run, state: time.sleep(0.25))
    (seconds,) = continued(first, tmp_path, monkeypatch).took
    assert 0.25 < seconds < 100


def test_a_run_that_ends_with_an_error_is_saved_without_its_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are lost in the same step: that is not the reason to end, nor the exit code's."""
    run = Saved(tmp_path, monkeypatch)
    run.checkpoints.resume()

    def hold(step: int) -> None:
        raise lost(step + 1)

    run.engines.hold = hold
    run.checkpoints.save_now(3)
    assert run.events[:2] == ["end", "save 3"] and list(run.store.steps()) == [3]


def test_the_best_checkpoint_is_that_of_the_best_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later one that is no better does not take its place; one without an evaluation neither."""
    run = Saved(tmp_path, monkeypatch, keep_best=True)
    run.checkpoints.resume()
    run.checkpoints.save_now(1)
    assert run.store.best is None
    for step, accuracy in ((2, 0.5), (3, 0.4), (4, 0.5)):
        run.best.observe(step, accuracy)
        run.checkpoints.save_now(step)
        assert run.store.best == run.store.steps()[2]
    run.best.observe(5, 0.6)
    run.checkpoints.save_now(5)
    assert run.store.best == run.store.steps()[5]


def test_the_best_of_those_that_are_saved_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluation of all was at step 1, which is not saved; retention keeps the best."""
    run = Saved(tmp_path, monkeypatch, keep_best=True, keep_last=1)
    run.checkpoints.resume()
    marked = []
    for step, accuracy in enumerate((0.9, 0.4, 0.8, 0.5, 0.3, 0.45, 0.1, float("nan")), 1):
        run.best.observe(step, accuracy)
        if step % 2 == 0:
            run.checkpoints.save_now(step)
            marked.append(run.store.best)
    steps = run.store.steps()
    assert list(steps) == [4, 8]
    assert [path and path.name[-1] for path in marked] == ["2", "4", "4", "4"]


def test_what_other_questions_have_found_is_no_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with harder ones: what it had found on the easy ones is never reached."""
    more: dict[str, Any] = {"keep_best": True, "keep_last": 1}
    easy = Saved(tmp_path, monkeypatch, asked="easy", **more)
    easy.checkpoints.resume()
    easy.best.observe(2, 0.9)
    easy.checkpoints.save_now(2)
    hard = continued(easy, tmp_path, monkeypatch, asked="hard", **more)
    assert any("asked something else" in event for event in hard.events)
    assert hard.best.value is None and hard.store.best == hard.store.steps()[2]
    for step, accuracy in ((4, 0.2), (6, 0.1)):
        hard.best.observe(step, accuracy)
        hard.checkpoints.save_now(step)
    assert list(hard.store.steps()) == [4, 6] and hard.store.best == hard.store.steps()[4]
    again = continued(hard, tmp_path, monkeypatch, asked="hard", **more)
    assert again.best.value == 0.2 and not any("asked" in event for event in again.events)


def test_an_evaluation_made_up_for_marks_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop had cut off that of step 4; no later one that is saved is as good, at the start after
    too, and retention keeps the best."""
    more: dict[str, Any] = {"keep_best": True, "keep_last": 1}
    first = Saved(tmp_path, monkeypatch, **more)
    first.checkpoints.resume()
    first.best.observe(2, 0.4)
    first.checkpoints.save_now(2)
    first.checkpoints.save_now(4)
    again = continued(first, tmp_path, monkeypatch, **more)
    again.best.observe(4, 0.9)
    again.checkpoints.evaluated(4)
    for step, accuracy in ((5, 0.5), (6, 0.6)):
        again.best.observe(step, accuracy)
        again.checkpoints.save_now(step)
    assert list(again.store.steps()) == [4, 6]
    assert again.store.best == again.store.steps()[4]
    last = continued(again, tmp_path, monkeypatch, **more)
    last.best.observe(7, 0.95)
    last.best.observe(8, 0.8)
    last.checkpoints.save_now(8)
    assert list(last.store.steps()) == [4, 8]


def test_a_mark_that_a_kill_cut_off_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the checkpoint of the best evaluation and its mark."""
    first = Saved(tmp_path, monkeypatch)
    first.checkpoints.resume()
    for step, accuracy in ((2, 0.4), (4, 0.9)):
        first.best.observe(step, accuracy)
        first.checkpoints.save_now(step)
    steps = first.store.steps()
    first.store.mark_best(steps[2])
    again = continued(first, tmp_path, monkeypatch)
    assert again.store.best == steps[4]
    again.best.observe(5, 0.5)
    again.checkpoints.save_now(5)
    assert again.store.best == steps[4]


def test_an_evaluation_made_up_for_marks_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start writes the other format, whose checkpoints have other names."""
    first = Saved(tmp_path, monkeypatch)
    first.checkpoints.resume()
    first.checkpoints.save_now(4)
    again = continued(first, tmp_path, monkeypatch, format="megatron_lm")
    again.best.observe(4, 0.9)
    again.checkpoints.evaluated(4)
    assert again.store.best == first.store.steps()[4]


def test_an_evaluation_made_up_for_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of all was at step 3, which is not saved: with what is saved alone."""
    more: dict[str, Any] = {"keep_best": True, "keep_last": 9}
    first = Saved(tmp_path, monkeypatch, **more)
    first.checkpoints.resume()
    first.best.observe(2, 0.4)
    first.checkpoints.save_now(2)
    first.best.observe(3, 0.9)
    first.checkpoints.save_now(4)
    again = continued(first, tmp_path, monkeypatch, **more)
    for value, wanted in ((0.3, 2), (0.6, 4)):
        again.best.observe(4, value)
        again.checkpoints.evaluated(4)
        assert again.store.best == again.store.steps()[wanted]
    again.best.observe(6, 0.5)
    again.checkpoints.save_now(6)
    assert again.store.best == again.store.steps()[4]


def test_the_best_of_the_version_before_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run_state.json has the best evaluation alone: that of its own step, if it is marked."""
    run = Saved(tmp_path, monkeypatch, keep_best=True)
    run.checkpoints.resume()
    run.best.observe(2, 0.5)
    run.checkpoints.save_now(2)
    file = run.store.steps()[2] / "run_state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"best": state["best"]["found"][:2]}))
    run.best.observe(3, 0.9)
    for step, accuracy, wanted in ((4, 0.4, 2), (5, 0.6, 5)):
        run.best.observe(step, accuracy)
        run.checkpoints.save_now(step)
        assert run.store.best == run.store.steps()[wanted]


def test_a_held_out_loss_that_is_not_finite_can_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never the best, and one that follows is."""
    run = Saved(tmp_path, monkeypatch, keep_best=True)
    run.checkpoints.resume()
    run.best.observe(0, float("nan"))
    run.checkpoints.save_now(1)
    assert run.store.best is None and run.best.step is None
    run.best.observe(2, -3.0)
    run.best.observe(3, float("inf"))
    run.checkpoints.save_now(2)
    assert run.best.step == 2 and run.store.best == run.store.steps()[2]


def test_a_mark_is_remembered_where_a_kill_came_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start makes the same evaluation, and finds the mark set: nothing on the disk says
    what was found there. The best of all is not saved; retention keeps the best that is."""
    more: dict[str, Any] = {"keep_best": True, "keep_last": 1}
    run = Saved(tmp_path, monkeypatch, **more)
    run.checkpoints.resume()
    run.checkpoints.save_now(2)
    for _ in range(2):
        run = continued(run, tmp_path, monkeypatch, **more)
        run.best.observe(2, 0.6)
        run.checkpoints.evaluated(2)
        assert run.best.marked == (2, 0.6)
    run.best.observe(3, 0.7)
    run.best.observe(4, 0.5)
    run.checkpoints.save_now(4)
    assert list(run.store.steps()) == [2, 4] and run.store.best == run.store.steps()[2]


@pytest.mark.parametrize(("first", "second", "wanted"), [(0.8, 0.5, 2), (0.5, 0.8, 3)])
def test_where_the_best_has_broken_the_best_of_the_others_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, second: float, wanted: int
) -> None:
    """Not the one that the next start continues from, whatever it is."""
    run = Saved(tmp_path, monkeypatch, keep_best=True)
    run.checkpoints.resume()
    for step, accuracy in ((2, first), (3, second), (4, 0.9)):
        run.best.observe(step, accuracy)
        run.checkpoints.save_now(step)
    steps = run.store.steps()
    steps[4].rename(steps[4].with_name(f"{steps[4].name}.broken-1"))
    again = continued(run, tmp_path, monkeypatch, keep_best=True)
    assert again.store.best == steps[wanted]
    assert again.best.marked == (wanted, 0.8)
