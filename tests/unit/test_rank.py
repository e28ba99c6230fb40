"""How a rank's process ends: its exit code, and what it leaves for the launcher and for a reader.

Real ranks under torchrun: tests/dist/test_launcher.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sfpo_megatron.launcher.failures import first_failure
from sfpo_megatron.outputs.directory import RunDirectory

RANK = """
import errno, os, signal, sys
from sfpo_megatron.data.errors import BadRowsError, DataError
from sfpo_megatron.launcher.rank import run_rank
from sfpo_megatron.families.safetensors_header import ModelFilesError
from sfpo_megatron.plugins import PluginError
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.errors import CannotBeUsed

def wrong(line):
    return DataError(f"rows.jsonl:{line}", found="nothing", expected="an answer", fix="add it")

def run():
    match sys.argv[2]:
        case "leaves": sys.exit(0)
        case "leaves with text": sys.exit("no licence")
        case "signal": os.kill(os.getpid(), signal.SIGTERM)
        case "two signals":  # as from a terminal and from the launcher, in one moment
            both = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            for signum in both: os.kill(os.getpid(), signum)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        case "raises": raise KeyError("x")
        case "bad row": raise BadRowsError([wrong(n) for n in (1, 2)], {"without answer": 2})
        case "away":
            try:
                raise ConnectionError("the hub is away")
            except ConnectionError as error:
                raise wrong(1) from error
        case "model file": raise ModelFilesError("a broken one", "a whole one", "copy it again")
        case "model file away":
            try:
                raise OSError(errno.ESTALE, "Stale file handle")
            except OSError as error:
                raise ModelFilesError("no file", "a file", "look there") from error
        case "reward": raise CannotBeUsed("reward.function: found no mine.py, expected it; add it")
        case "own code": raise PluginError("loss", found="no mine.py", expected="it", fix="add it")
    return False

sys.exit(run_rank(run, directory=RunDirectory.of(sys.argv[1]), launched=False))
"""


@pytest.mark.parametrize(
    ("what", "exit_code", "said"),
    [
        ("ends", 0, ""),
        ("raises", 1, "error: rank 0: KeyError: 'x'"),
        (
            "bad row",
            2,
            "error: rank 0: BadRowsError: rows.jsonl:1: found nothing, expected an",
        ),
        ("away", 1, "error: rank 0: DataError: rows.jsonl:1: found nothing"),
        ("own code", 2, "error: rank 0: PluginError: loss: found no mine.py, expected it; add it"),
        ("model file", 2, "error: rank 0: ModelFilesError: found a broken one, expected a whole"),
        ("model file away", 1, "error: rank 0: ModelFilesError: found no file"),
        ("reward", 2, "error: rank 0: CannotBeUsed: reward.function: found no mine.py"),
        ("leaves", 1, "error: rank 0: SystemExit: 0"),
        ("leaves with text", 1, "error: rank 0: SystemExit: no licence"),
        ("signal", 128 + signal.SIGTERM, ""),
        ("two signals", 128 + signal.SIGINT, ""),
    ],
)
def test_only_a_run_that_returns_ends_with_0(
    tmp_path: Path, what: str, exit_code: int, said: str
) -> None:
    """A loss, a sink or a data source of a user's own may call `sys.exit`. 2 says that the same
    command would end in the same way: a job is not requeued then (launch/slurm/train.sbatch)."""
    environ = os.environ | {"RANK": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RANK, str(tmp_path / "run"), what]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert ended.returncode == exit_code, ended.stderr
    assert ended.stderr.startswith(said)
    assert bool(ended.stderr) == bool(said)
    assert (tmp_path / "run/logs/rank_0.err").exists() == bool(said)
    if said:
        left = (tmp_path / "run/logs/rank_0.exit").read_text()
        assert left == f"{exit_code}\n"


def test_a_message_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """The file system may be what the run has ended of: the launcher still says who has."""
    folder = RunDirectory(tmp_path)
    folder.failure_file(5).mkdir(parents=True)
    folder.failure_file(6).write_text("{")
    for rank in (5, 6):
        said, code = first_failure({rank: (7, 15)}, folder)
        assert said == f"error: rank {rank} (pid 15) ended with exit code 7 and no message"
        assert code == 1


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_unwinds_rank_0(signum: signal.Signals) -> None:
    """SIGUSR1 too where nothing is saved: a job's end sends it to every process, and its default
    would leave the engines."""
    program = (
        "import os, time\n"
        "from sfpo_megatron.launcher.rank import install_signal_handlers\n"
        "install_signal_handlers(0)\n"
        f"try:\n  os.kill(os.getpid(), {int(signum)})\n  time.sleep(60)\n"
        "finally:\n"
        f"  os.kill(os.getpid(), {int(signum)})\n"
        "  print('closed')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signum, "closed\n", "")
