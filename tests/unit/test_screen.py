"""What a terminal, a pipe and a program see of a run. Terminals are pseudo-terminals, whose screen
is put together from what was written, control characters included.

Not exercised: what a real terminal makes of a resize in the middle of a line.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from sfpo_megatron.host.progress import note
from sfpo_megatron.host.spans import span
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.tracking.activity import Activity
from sfpo_megatron.tracking.screen import PlainScreen, open_screen, screen

ROOT = Path(__file__).parents[2]
COLUMNS = 80
ERASE = "\x1b[2K"
SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"

RUN = """
import os, subprocess, sys, time
from made.configs import run_config
from sfpo_megatron.host.progress import advance, note
from sfpo_megatron.host.spans import span
from sfpo_megatron.tracking.screen import open_screen
from sfpo_megatron.tracking.tracker import Tracker

STEP = {"reward_mean": 0.5, "accuracy": 0.25, "entropy": 1.0, "grad_norm": 3.0, "num_passes": 4}
STEP |= {"time/step_s": 1.5}
config = run_config(output_dir=sys.argv[1], train={"num_steps": 20})
"""


def python(code: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", RUN + textwrap.dedent(code), str(folder)]


def variables(**more: str) -> dict[str, str]:
    left_out = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return kept | {"PYTHONPATH": path, "TERM": "xterm-256color"} | more


def in_terminal(command: list[str], **more: str) -> tuple[int, str]:
    """Exit code of `command` in a terminal of its own, and all that it wrote there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, variables(COLUMNS=str(COLUMNS), **more))
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # its last process has closed it
            break
        if not part:
            break
        written += part
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode()


def on_screen(written: str) -> list[str]:
    """The lines that stand on the terminal in the end, scrolled ones included."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
        elif part in (ERASE, "\x1b[K"):
            lines[-1] = lines[-1][:column] if part == "\x1b[K" else ""
        elif part.startswith("\x1b"):
            assert part.endswith(("m", "h", "l", "A")), part
            if part.endswith("A"):
                lines.pop()
        else:
            if column == COLUMNS:
                lines.append("")
                column = 0
            lines[-1] = (lines[-1].ljust(column)[:column] + part) + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


STEPS = """
with open_screen("lines"), Tracker(config) as tracker:
    tracker.progress("run here: 20 train steps")
    for step in (1, 2):
        with span("step", step=step):
            with span("collect"):
                for done in (0, 64, 128):
                    advance("rollouts", done, 128)
                    time.sleep(0.25)
            with span("sfpo"), span("passes", number=2, of=4):
                advance("minibatches", 1, 2)
                time.sleep(0.25)
        print("a reward prints this")
        tracker.log({"step": step, **STEP})
    os.write(2, b"as does another process\\n")
    time.sleep(0.3)
"""


def test_a_terminal_has_a_bar_below_lines_and_is_left_clean(tmp_path: Path) -> None:
    code, written = in_terminal(python(STEPS, tmp_path / "run"))
    assert code == 0, written
    for shown in ("generation", "64/128", "pass 2/4", "1/2", "step 1/20", "ETA 0:00:"):
        assert shown in re.sub(r"\x1b\[[\d;]*m", "", written), shown
    assert written.count(HIDE) == written.count(SHOW) == 1 and SHOW in written[-40:]
    lines = on_screen(written)
    step = "step  {}/20  reward  0.500  acc  0.250  entropy  1.000  s/step   1.5"
    assert lines[0] == "run here: 20 train steps"
    assert lines[1:5] == [
        "a reward prints this",
        step.format(1),
        "a reward prints this",
        step.format(2),
    ]
    assert "as does another process" in lines  # on a line of its own, whole
    assert lines[-1] == "" and not any("━" in line for line in lines[-2:])


ENDS = {
    "exception": "raise RuntimeError('this ends the run')",
    "interrupt": "os.kill(os.getpid(), 2); time.sleep(5)",
    "exit": "sys.exit(3)",
}


@pytest.mark.parametrize("how", ENDS)
def test_whatever_ends_the_run_leaves_the_terminal_clean(how: str, tmp_path: Path) -> None:
    code, written = in_terminal(
        python(
            f"""
            import signal, threading
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in some shells
            try:
                with open_screen("lines"), Tracker(config) as tracker, span("build"):
                    time.sleep(0.5)
                    {ENDS[how]}
            finally:
                assert [t for t in threading.enumerate() if t.name == "screen"] == []
                print("and stdout is", type(sys.stdout).__name__)
            """,
            tmp_path / "run",
        )
    )
    assert code != 0
    assert "building the model" in written
    after = written.rpartition(SHOW)[2]
    assert "building the model" not in after and HIDE not in after
    lines = on_screen(written)
    assert "and stdout is TextIOWrapper" in lines
    assert not any("building the model" in line for line in lines), lines


def test_a_forked_process_has_the_streams_and_not_the_display(tmp_path: Path) -> None:
    """Checkpoints are written by such a process: it must not wait for a lock of a thread that it
    does not have."""
    code, written = in_terminal(
        python(
            """
            with open_screen("lines"):
                time.sleep(0.3)
                if not os.fork():
                    print("stdout is", type(sys.stdout).__name__, flush=True)
                    os._exit(0)
                os.wait()
            """,
            tmp_path / "run",
        )
    )
    assert code == 0 and "stdout is TextIOWrapper" in written


PLAIN = {"pipe": {}, "NO_COLOR": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}


@pytest.mark.parametrize("where", PLAIN)
def test_plain_lines_have_no_control_characters(where: str, tmp_path: Path) -> None:
    command = python(STEPS, tmp_path / "run")
    if where == "pipe":
        done = subprocess.run(command, capture_output=True, text=True, env=variables())
        assert done.returncode == 0, done.stderr
        written = done.stdout
    else:
        code, written = in_terminal(command, **PLAIN[where])
        assert code == 0, written
    lines = written.replace("\r\n", "\n").splitlines()
    assert all(line.isprintable() for line in lines), lines
    said = "  reward  0.500  acc  0.250  entropy  1.000  grad 3.00e+00  passes 4  s/step   1.5"
    assert lines[1:3] == ["a reward prints this", f"step  1/20{said}"]
    assert lines[4].startswith(f"step  2/20{said}  ETA 0:00:")


def test_json_is_all_there_is_on_stdout_and_has_what_metrics_jsonl_has(tmp_path: Path) -> None:
    """What is printed beside it, in this process and by those that it starts, is on stderr."""
    code = """
    with open_screen("json"), Tracker(config) as tracker:
        with span("build"):
            time.sleep(0.8)
        with span("step", step=1):
            time.sleep(0.8)
        tracker.progress("hello")
        tracker.important("warning: look")
        print("a print"); sys.stdout.flush()
        subprocess.run(["echo", "of another process"])
        tracker.log({"step": 1, **STEP, "loss": float("nan")})
        tracker.log({"step": 1, "eval/accuracy": 0.5, "time/evaluate_s": 3.0})
    print("after the end")
    """
    command = python(code, tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True, env=variables())
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    metrics = RunDirectory.of(tmp_path / "run").metrics.read_text().splitlines()
    assert [one for one in found if "event" not in one] == [json.loads(line) for line in metrics]
    events = [one for one in found if "event" in one]
    assert {"event": "message", "important": False, "text": "hello"} in events
    assert {"event": "message", "important": True, "text": "warning: look"} in events
    # Before the first span a slow machine has time for an event without a stage.
    events = [one for one in events if one.get("stage") != ""]
    starting = [one for one in events if one["event"] == "starting"]
    assert [one["stage"] for one in starting] == ["build"]
    assert starting[0]["text"] == "building the model in Megatron"
    assert [one["event"] for one in events][1] == "started"
    assert {"a print", "of another process", "after the end"} <= set(done.stderr.splitlines())


def test_quiet_is_warnings_and_the_end(tmp_path: Path) -> None:
    code = """
    with open_screen("quiet"), Tracker(config) as tracker:
        tracker.progress("hello")
        tracker.log({"step": 1, **STEP})
        tracker.important("warning: look")
    """
    command = python(code, tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True, env=variables())
    assert (done.returncode, done.stdout, done.stderr) == (0, "warning: look\n", "")


def test_another_ranks_lines_are_whole_and_wipe_the_bar_first() -> None:
    code = """
    from sfpo_megatron.host.terminal import wipe_before_writing
    wipe_before_writing()
    print("one"); print("two", "halves", end=""); print(" of a line")
    print("three", file=sys.stderr)
    sys.stdout.write("no end"); sys.stdout.flush()
    """
    status, written = in_terminal(python(code, Path("unused")))
    wipe = "\r\x1b[K"
    wanted = ("one", "two halves of a line", "three", "no end")
    assert (status, written) == (0, "".join(f"{wipe}{line}\r\n" for line in wanted))


def test_the_launcher_gives_a_terminal_back_and_leaves_a_pipe_alone() -> None:
    """A rank that is killed leaves the line and no cursor."""
    code = """
    from sfpo_megatron.host.terminal import announce, give_back
    announce("starting the trainer's ranks", sys.stdout)
    give_back(sys.stdout)
    print("error: rank 0 was killed")
    """
    command = python(code, Path("unused"))
    status, written = in_terminal(command)
    assert status == 0 and written.count(SHOW) == 1
    assert on_screen(written) == ["error: rank 0 was killed", ""]
    done = subprocess.run(command, capture_output=True, text=True, env=variables())
    assert done.stdout == "error: rank 0 was killed\n"


def test_a_start_that_takes_long_says_what_it_waits_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, activity = PlainScreen(), Activity()
    now = time.monotonic()
    with activity.watching(), span("engines"):
        note("engine 0 is loading weights")
        for seconds in (9.0, 11.0, 13.0, 22.0):
            monkeypatch.setattr(time, "monotonic", lambda at=now + seconds: at)
            plain.tick(activity.now)
    with activity.watching(), span("step", step=1):
        monkeypatch.setattr(time, "monotonic", lambda: now + 100)
        plain.tick(activity.now)
    assert capsys.readouterr().out.splitlines() == [
        "waiting for the engines: engine 0 is loading weights (0:00:11)",
        "waiting for the engines: engine 0 is loading weights (0:00:22)",
    ]


def test_the_screen_is_plain_lines_again_after_the_run() -> None:
    before = threading.active_count()
    with open_screen("quiet") as opened:
        assert screen() is opened
    assert isinstance(screen(), PlainScreen) and screen() is not opened
    assert threading.active_count() == before
