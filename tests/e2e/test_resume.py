"""A run that is killed, or asked to stop, and started again with the same command gives the
metrics.jsonl and the weights of one without a break: every key but times, bit for bit.

The entropy gate closes at step 7 (its window of 6 is full then), so that a window that was not
saved shows. By default on saved rollouts, without engines; with engines, TP2 and DP2, and at 20
random moments: `make test-full`. Not exercised: Slurm (tests/slurm), more than two ranks.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import psutil
import pytest
from digits import ALONE, environment
from made.same_run import assert_same_run, lines
from made.waiting import wait_for

from benchmarks.common import provenance
from sfpo_megatron.checkpoints import manifest
from sfpo_megatron.outputs.stopping import STOPPED_EXIT_CODE

NUM_STEPS = 10
LAYOUTS = {
    "alone": ALONE,
    "TP2": ("parallel.tensor=2", "parallel.data=1"),
    "DP2": ("parallel.tensor=1", "parallel.data=2"),
}


TWO = ("TP2", "DP2")


def make_config(folder: Path, *, engines: bool, async_steps: int = 0, **checkpoint: Any) -> Path:
    changes: dict[str, Any] = {}
    train = {"num_steps": NUM_STEPS}
    if not engines:
        rollouts = folder / "rollouts.safetensors"
        digits.save_rollouts(rollouts, num_steps=NUM_STEPS, num_prompts=8, group_size=4)
        changes["debug"] = {"train_only": str(rollouts)}
        train |= {"prompts_per_step": 8, "group_size": 4}
    return digits.write_config(
        folder,
        digits.make_model(folder / "model"),
        train=train,
        sfpo={"entropy_window": 6, "entropy_zscore_threshold": -1e9},
        rollout={"reproducible": True, "async_steps": async_steps},
        eval={"every": 5},
        checkpoint={"every": 2} | checkpoint,
        **changes,
    )


def assert_went_on(run: Path, straight: Path) -> None:
    """The run is one without a break, the gate's closing included."""
    assert_same_run(run, straight)
    active = [line["sfpo_active"] for line in lines(run) if "sfpo_active" in line]
    assert active == [True] * 6 + [False] * (NUM_STEPS - 6)


def train(config: Path, overrides: tuple[str, ...], run: Path) -> str:
    """Runs to the end."""
    variables = environment(overrides)
    return digits.train(config, *overrides, f"output_dir={run}", environment=variables)


def interrupt(
    config: Path, overrides: tuple[str, ...], run: Path, when: Callable[[], bool], signum: int
) -> tuple[int, str]:
    """Start the run, hit it when `when` says so: (exit code, output). SIGKILL ends all its
    processes at once."""
    variables = environment(overrides)
    process = digits.start_train(config, *overrides, f"output_dir={run}", environment=variables)

    def due() -> bool:
        return process.poll() is not None or when()

    try:
        wait_for(due, timeout_s=200, what="the moment")
        if signum == signal.SIGKILL:
            digits.end(process)
        elif process.poll() is None:
            process.send_signal(signum)
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        digits.end(process)
        raise
    return process.returncode, output


class Delayed:
    """True from so many seconds after a path has appeared."""

    def __init__(self, path: Path, delay_s: float) -> None:
        self._path, self._delay_s, self._begun = path, delay_s, 0.0

    def __call__(self) -> bool:
        if not self._begun and self._path.exists():
            self._begun = time.monotonic()
        return bool(self._begun) and time.monotonic() > self._begun + self._delay_s


def after_lines(run: Path, count: int, delay_s: float = 0.0) -> Callable[[], bool]:
    """True once so many train steps are logged, by the process that is started next: lines of the
    one before say nothing of whether its handlers of signals are in place."""
    metrics = run / "metrics.jsonl"

    def written() -> int:
        return metrics.stat().st_mtime_ns if metrics.exists() else 0

    before = written()

    def when() -> bool:
        if written() == before or sum("loss" in line for line in lines(run)) < count:
            return False
        time.sleep(delay_s)
        return True

    return when


@pytest.mark.parametrize("name", ["alone", *[pytest.param(n, marks=pytest.mark.full) for n in TWO]])
def test_killed_and_stopped(tmp_path: Path, name: str) -> None:
    """kill -9, then SIGTERM, then SIGUSR1, each in another step, each resumed."""
    config = make_config(tmp_path, engines=False)
    layout = LAYOUTS[name]
    straight, run = tmp_path / "straight", tmp_path / "interrupted"
    train(config, layout, straight)
    code, _ = interrupt(config, layout, run, after_lines(run, 3), signal.SIGKILL)
    assert code == -signal.SIGKILL
    for signum, count in ((signal.SIGTERM, 5), (signal.SIGUSR1, 7)):
        code, output = interrupt(config, layout, run, after_lines(run, count), signum)
        assert code == STOPPED_EXIT_CODE, output
        assert f"stopped by {signum.name}" in output and "resumed from" in output, output
    output = train(config, layout, run)
    assert "resumed from" in output and "held-out accuracy" not in output.split("resumed")[0]
    assert_went_on(run, straight)
    kept = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
    assert len(kept) == 2 and kept[1] == "step_0000010"  # the other is where it was stopped


@pytest.mark.full
@pytest.mark.parametrize("async_steps", [0, 1])
@pytest.mark.parametrize("layout", TWO)
def test_five_then_kill_then_five_with_engines(
    tmp_path: Path, layout: str, async_steps: int
) -> None:
    """Saved at once with async_steps 0, beside the training with 1."""
    saves_beside = async_steps == 1
    config = make_config(
        tmp_path, engines=True, async_steps=async_steps, every=5, async_save=saves_beside
    )
    straight, run = tmp_path / "straight", tmp_path / "killed"
    train(config, LAYOUTS[layout], straight)
    # One line more than the checkpoint's step: it is cut off, and made again. What is saved beside
    # the training may take longer than that step.
    checkpoint, logged = run / "checkpoints/step_0000005", after_lines(run, 6)
    interrupt(
        config, LAYOUTS[layout], run, lambda: checkpoint.exists() and logged(), signal.SIGKILL
    )
    assert sum("loss" in line for line in lines(run)) >= 6
    output = train(config, LAYOUTS[layout], run)
    assert "step_0000005 after step 5" in output
    assert_went_on(run, straight)


@pytest.mark.full
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    config = make_config(tmp_path, engines=False, every=3)
    straight, run = tmp_path / "straight", tmp_path / "broken"
    train(config, LAYOUTS["DP2"], straight)
    interrupt(config, LAYOUTS["DP2"], run, after_lines(run, 7), signal.SIGKILL)
    newest = run / "checkpoints/step_0000006"
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    output = train(config, LAYOUTS["DP2"], run)
    assert "step_0000006 is broken" in output and file.name in output
    assert "step_0000003 after step 3" in output
    assert_went_on(run, straight)


@pytest.mark.full
def test_a_disk_that_fills_up_in_mid_save(tmp_path: Path) -> None:
    """Here a limit on the size of files, put on the running ranks: the run ends with one message,
    the checkpoint before is as it was, and with room the same command continues."""
    config = make_config(tmp_path, engines=False, every=3)
    straight, run = tmp_path / "straight", tmp_path / "full"
    train(config, LAYOUTS["DP2"], straight)
    process = digits.start_train(config, *LAYOUTS["DP2"], f"output_dir={run}")
    try:
        first = run / "checkpoints/step_0000003"
        wait_for(first.exists, timeout_s=60, what="a checkpoint")
        for child in digits.descendants(process):
            if "RANK" in child.environ():
                child.rlimit(psutil.RLIMIT_FSIZE, (300_000, psutil.RLIM_INFINITY))
        output, _ = process.communicate(timeout=60)
    finally:
        digits.end(process)
    assert process.returncode == 1
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "could not be written" in error, output
    assert "File too large" in error or "a write came short" in error, output
    assert "that of step 3 is kept" in error and "Traceback" not in output
    assert [p.name for p in first.parent.iterdir() if p.is_dir()] == [first.name]
    assert manifest.faults(first) == []
    train(config, LAYOUTS["DP2"], run)
    assert_went_on(run, straight)


@pytest.mark.full
@pytest.mark.parametrize("must_save_within_s", [None, 0.5])
def test_stopped_at_20_random_moments(tmp_path: Path, must_save_within_s: float | None) -> None:
    """Ten without a limit and ten with one, SIGTERM and SIGUSR1 in turn, at any moment between the
    launcher's first line and the end of a run that is not stopped; one that ends before its moment
    begins again. With a limit, steps may be given up and redone."""
    config = make_config(tmp_path, engines=False, every=4, must_save_within_s=must_save_within_s)
    straight, layout = tmp_path / "straight", LAYOUTS["TP2"]
    begun = time.monotonic()
    train(config, layout, straight)
    length_s = time.monotonic() - begun
    moments = random.Random(repr(must_save_within_s))
    counts = {"stopped": 0, "before_the_first_step": 0, "given_up": 0, "finished": 0}
    run = tmp_path / "run-0"
    while counts["stopped"] < 10:
        shutil.rmtree(run / "logs", ignore_errors=True)  # the launcher makes it when it listens
        due = Delayed(run / "logs", moments.uniform(0.0, length_s))
        signum = (signal.SIGTERM, signal.SIGUSR1)[counts["stopped"] % 2]
        code, output = interrupt(config, layout, run, due, signum)
        assert code in (0, STOPPED_EXIT_CODE), (code, output)
        counts["stopped"] += code != 0
        counts["before_the_first_step"] += "before the first train step" in output
        counts["given_up"] += "no time to end this step" in output
        if code == 0:
            counts["finished"] += 1
            assert_went_on(run, straight)
            run = tmp_path / f"run-{counts['finished']}"
    train(config, layout, run)
    assert_went_on(run, straight)
    limit = "none" if must_save_within_s is None else f"{must_save_within_s:g}s"
    provenance.write_cpu(f"stop_signals_limit_{limit}", counts)


@pytest.mark.full
def test_stopped_while_generating(tmp_path: Path) -> None:
    """With engines, within a limit that no step meets: the state before the step is saved, and the
    step is redone from its prompts."""
    config = make_config(tmp_path, engines=True, every=50, must_save_within_s=0.01)
    straight, run = tmp_path / "straight", tmp_path / "stopped"
    train(config, LAYOUTS["DP2"], straight)
    for count in (2, 5):
        code, output = interrupt(
            config, LAYOUTS["DP2"], run, after_lines(run, count), signal.SIGUSR1
        )
        assert code == STOPPED_EXIT_CODE, output
    train(config, LAYOUTS["DP2"], run)
    assert_went_on(run, straight)
