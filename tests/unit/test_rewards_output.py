"""What a reward function of one's own prints and writes: kept, bounded, and harmless."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from own_rewards import MEET, Own, log_of, own, problem, rewards

from sfpo_megatron.host.scratch import Scratch, remove_abandoned
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.sandbox.output import OutputLog

__all__ = ["own"]  # the fixture


def test_what_it_prints_goes_to_the_log_of_its_process(
    own: Own, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = own(
        MEET
        + """
import logging, os, subprocess, sys
print("imported")
def score(response, prompt):
    meet(response, "a", "b")
    print("out", response)
    print("err", response, file=sys.stderr)
    logging.getLogger("mine").warning("logged %s", response)
    os.write(1, f"raw {response}\\n".encode())
    subprocess.run(["echo", "child", response])
    return 1.0
""",
        num_workers=2,
    )
    assert rewards(pool.score([(problem(), "a"), (problem(), "b")])) == [1.0, 1.0]
    pool.close()
    logs = [log_of(number).splitlines() for number in (0, 1)]
    for lines, name in zip(sorted(logs, key=lambda lines: lines[1]), "ab", strict=True):
        expected = ["imported", *(f"{how} {name}" for how in ("out", "err", "raw", "child"))]
        assert [line for line in lines if "logged" not in line] == expected
        assert any(line.endswith(f"logged {name}") for line in lines)
    assert capfd.readouterr() == ("", ""), "nothing on the console"


def test_any_text_can_be_printed(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the locale; a response may hold half of a surrogate pair."""
    monkeypatch.setenv("LC_ALL", "POSIX")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    pool = own("""
import sys
def score(response, prompt):
    print(response)
    print(response, file=sys.stderr)
    return 1.0
""")
    assert rewards(pool.score([(problem(), "é\ud800")])) == [1.0]
    assert log_of() == "é\\ud800\n" * 2


def test_no_amount_of_output_harms(own: Own) -> None:
    """80 MiB: more than the log and more than a file of the process may hold."""
    pool = own("""
def score(response, prompt):
    for _ in range(80 if response == "much" else 1):
        print("x" * ((1 << 20) - 1))
    return 1.0
""")
    (pid,) = pool.worker_pids
    assert rewards(pool.score([(problem(), r) for r in ("little", "much", "little")])) == [1.0] * 3
    assert pool.worker_pids == [pid]
    pool.close()
    size = RunDirectory.of("run").scoring_log(0).stat().st_size
    assert 64 << 20 < size < (64 << 20) + 100
    assert log_of().endswith("\n[67108864 bytes of output: what follows is dropped]\n")


def test_output_does_not_stretch_the_time_limit(own: Own) -> None:
    """A response that prints without end is cut like any other."""
    pool = own(
        "def score(response, prompt):\n"
        "    while response == 'endless': print('x' * 1000)\n"
        "    return 1.0\n",
        timeout_s=0.5,
    )
    scores = pool.score([(problem(), r) for r in ("a", "endless", "b")])
    assert rewards(scores) == [1.0, 0.0, 1.0]
    assert [score.timed_out for score in scores] == [False, True, False]


def test_a_log_that_cannot_be_written_harms_nothing(own: Own, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    pool = own("def score(response, prompt): print('x' * 1000); return 1.0")
    assert rewards(pool.score([(problem(), "a")] * 300)) == [1.0] * 300


def test_the_log_is_appended_to_and_keeps_the_last_words(tmp_path: Path) -> None:
    path = tmp_path / "logs/scoring-0.log"
    for text in (b"one\n", b"two\n"):
        output = OutputLog(path, limit_bytes=10)
        output.write(text)
        output.close()
    assert path.read_bytes() == b"one\ntwo\n"
    output = OutputLog(path, limit_bytes=10)
    for text in (b"12345\n", b"67890\n", b"last\n"):
        output.write(text)
    output.close()
    note = b"\n[10 bytes of output: what follows is dropped]\n"
    assert path.read_bytes() == b"one\ntwo\n12345\n6789" + note
    assert output.tail == "12345\n67890\nlast"


def test_temporary_files_go_to_a_scratch_directory_that_is_removed(own: Own) -> None:
    pool = own(
        MEET
        + """
import os, tempfile
def score(response, prompt):
    meet(response, "a", "b")
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"x")
    os.makedirs(os.path.join(os.environ["TMPDIR"], "deep/er"))
    pathlib.Path(response).write_text(file.name)
    return os.path.dirname(file.name) == os.environ["TMPDIR"]
""",
        num_workers=2,
    )
    assert rewards(pool.score([(problem(), "a"), (problem(), "b")])) == [1.0, 1.0]
    files = [Path(Path(name).read_text()) for name in ("a", "b")]
    assert files[0].parent != files[1].parent and all(file.is_file() for file in files)
    assert os.environ.get("TMPDIR") not in [str(file.parent) for file in files]
    pool.close()
    assert not any(file.parent.exists() for file in files)


def test_what_a_killed_run_left_behind_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: not what another process still uses, nor files of other names."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = (
        "import os, sys\nfrom sfpo_megatron.host.scratch import Scratch\n"
        "print(Scratch('sfpo-scoring-').path, flush=True)\nsys.stdin.read()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    other = subprocess.Popen(
        [sys.executable, "-c", source], stdin=-1, stdout=-1, text=True, env=environment
    )
    assert other.stdout is not None
    theirs, mine = Path(other.stdout.readline().strip()), Scratch("sfpo-scoring-")
    (theirs / "deep").mkdir()
    (tmp_path / "sfpo-scoring").mkdir()
    (tmp_path / "sfpo-scoring-link").symlink_to(tmp_path / "sfpo-scoring")
    remove_abandoned("sfpo-scoring-")
    assert theirs.is_dir() and Path(mine.path).is_dir()
    other.kill()
    other.communicate()
    remove_abandoned("sfpo-scoring-")
    assert not theirs.exists() and Path(mine.path).is_dir()
    mine.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sfpo-scoring", "sfpo-scoring-link"]
