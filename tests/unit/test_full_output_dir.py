"""output_dir on a real file system that is read-only or full: one line, before anything starts.

Mounts in a namespace of its own, so only root can run it; other obstacles are in
test_config_output_dir.py and test_run_lock.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import DirectoryNotWritable, require_writable

CONFIG = """\
output_dir: mounted/run
model: {path: model}
data:
  train: [{source: reasoning_gym, task: chain_sum, size: 100}]
  eval: [{source: reasoning_gym, task: chain_sum, size: 10}]
"""
PREPARE = {
    "read-only": "mount -o remount,ro mounted",
    "full": "dd if=/dev/zero of=mounted/filler bs=4k 2>/dev/null",
    "full but for what the lock needs": "mkdir mounted/run && echo {} > mounted/run/.lock && "
    "dd if=/dev/zero of=mounted/filler bs=4k 2>/dev/null",
}
COMMANDS = """
import os, sys
from sfpo_megatron.cli import main
os.environ["PATH"] = f"{os.getcwd()}/bin:" + os.environ["PATH"]
slurm = ["slurm", "run.yaml", "--nodes=2", "--time=4:00:00", "--gpus-per-node=1"]
for command in ["train", "run.yaml"], ["sft", "run.yaml"], ["eval", "run.yaml"], slurm:
    print("code", main(command), file=sys.stderr, flush=True)
print("torch" in sys.modules)
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
    return done.returncode == 0


@pytest.mark.parametrize("what", PREPARE)
def test_every_command_says_so_in_one_line(
    tmp_path: Path, model_dir: Callable[..., Path], what: str
) -> None:
    if not can_mount():
        pytest.skip("mounting takes root")
    model_dir()
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho reached sbatch >&2\nexit 1\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    (tmp_path / "mounted").mkdir()
    script = f"mount -t tmpfs -o size=256k none mounted && {PREPARE[what]}\nexec $0 -c '{COMMANDS}'"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "False\n", done.stderr
    ours = ("error", "code", "Traceback", "reached")
    lines = [line for line in done.stderr.splitlines() if line.startswith(ours)]
    sign = "on a read-only file system" if what == "read-only" else "(No space left on device)"
    assert len(lines) == 8, done.stderr
    for error, code in zip(lines[::2], lines[1::2], strict=True):
        assert error.startswith("error: ") and "output_dir: found" in error and sign in error
        assert code == ("code 2" if what == "read-only" else "code 1")


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "room for them; free some space there, or choose another output_dir"),
        (errno.EDQUOT, "room for them; free some space there, or choose another output_dir"),
        (errno.EROFS, "a folder that can; choose another output_dir"),
        (errno.EACCES, "a folder that can; choose another output_dir or change its permissions"),
    ],
)
def test_the_fix_is_that_of_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    folder = RunDirectory.of(tmp_path / "run")
    require_writable(folder)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DirectoryNotWritable) as raised:
        require_writable(folder)
    line = f"output_dir: found {folder.path}, where files cannot be written ({os.strerror(number)})"
    assert str(raised.value) == f"{line}, expected {fix}"
    assert not any(folder.path.iterdir())
