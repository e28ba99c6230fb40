"""What a stranger gets: pip without any configuration or wheels of this machine, an empty venv, and
a run by what was installed. Each downloads gigabytes where pip finds a CUDA build of torch.

PYTHON=/path/to/python3.12 chooses the interpreter, as it does for make. Of the set for GPUs only
that its versions go together, by uv's resolver and the index's metadata. Not exercised: an install
by uv, one on ARM64, the build of TransformerEngine's extension.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import digits
import pytest
from made.makefile import MAKE, value

ROOT = Path(__file__).parents[2]
OURS = ("PIP_", "UV", "PYTHONPATH", "VIRTUAL_ENV", "MAKE", "MFLAGS")
KEPT = ("PIP_CERT", "PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
"""How the index is reached, which is the machine's."""


@pytest.fixture
def stranger() -> dict[str, str]:
    """The environment without what this project's machines or its developers have set up."""
    env = {n: v for n, v in os.environ.items() if n in KEPT or not n.startswith(OURS)}
    return {**env, "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Removed at once: pytest would keep the gigabytes of three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def tree(folder: Path) -> Path:
    """A copy of the files that git knows."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split("\0"):
        if name and os.path.lexists(ROOT / name):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    return folder / "tree"


def run(*command: str | Path, env: dict[str, str], cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def trains(python: Path, folder: Path, env: dict[str, str]) -> None:
    """Three steps of a random model at TP=2: engines, refit, a plot, an export."""
    config = digits.write_config(folder, digits.make_model(folder / "model"))
    run(python, "-m", "sfpo_megatron", "train", config, env=env, cwd=folder)
    train, _ = digits.read_metrics(folder / "run")
    assert [(line["step"], line["num_passes"]) for line in train] == [(1, 4), (2, 4), (3, 4)]
    for name in ("plot.png", "hf/model.safetensors"):
        assert (folder / "run" / name).stat().st_size > 0


@pytest.mark.full
def test_make_in_a_fresh_clone(tree: Path, folder: Path, stranger: dict[str, str]) -> None:
    said = run(MAKE, "venv", "UV=", env=stranger, cwd=tree)
    assert "megatron-core 0." in said and "\ntorch 2." in said
    trains(tree / ".venv/bin/python", folder, stranger)


@pytest.mark.full
def test_a_wheel_in_an_empty_venv(tree: Path, folder: Path, stranger: dict[str, str]) -> None:
    """Built by this Python, installed by the one that `make` would take."""
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*build, "-w", folder / "dist", tree, env=stranger, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    shutil.rmtree(tree)
    run(value("PYTHON", stranger), "-m", "venv", folder / "venv", env=stranger, cwd=folder)
    programs = folder / "venv/bin"
    run(programs / "python", "-m", "pip", "install", "-q", wheel, env=stranger, cwd=folder)
    run(programs / "sfpo-megatron", "install", "cpu", "--pip", env=stranger, cwd=folder)
    trains(programs / "python", folder, stranger)


@pytest.fixture
def uv(tmp_path: Path) -> str:
    """The one on PATH; else pip brings one."""
    if (found := shutil.which("uv")) is not None:
        return found
    command = (sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "uv", "uv")
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"uv is not on PATH, and pip cannot get it: {done.stderr.strip()[-200:]}")
    return str(tmp_path / "uv/bin/uv")


@pytest.mark.full
def test_the_versions_for_gpus_go_together_on_arm64(uv: str, tmp_path: Path) -> None:
    """There is no lock for it; docs/gpu.md says how to make one."""
    command = [uv, *shlex.split(value("LOCK_GPU", dict(os.environ)))]
    command[command.index("x86_64-manylinux_2_28")] = "aarch64-manylinux_2_28"
    command += ["-o", str(tmp_path / "lock"), "requirements/gpu.in"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode == 2 and "requirements/" not in done.stderr:
        pytest.skip(f"uv cannot resolve here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    locked = (tmp_path / "lock").read_text()
    assert "\ntransformer-engine==" in locked and "\nvllm==" in locked
    assert "\ntransformer-engine-torch==" not in locked, "it would be built with another torch"


def test_the_versions_for_gpus_go_together(uv: str, tmp_path: Path) -> None:
    """Resolved again, with the locked versions preferred, it is the same lock; a pin that does not
    fit, or whose release is gone, shows here."""
    committed = ROOT / "requirements/gpu-3.12.lock"
    lock = Path(shutil.copy(committed, tmp_path))
    command = [uv, *shlex.split(value("LOCK_GPU", dict(os.environ)))]
    command += ["-o", str(lock), "requirements/gpu.in"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    # 1: there is no solution. 2: an index that cannot be reached, among others.
    if done.returncode == 2 and "requirements/" not in done.stderr:
        pytest.skip(f"uv cannot resolve here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert lock.read_text() == committed.read_text(), "run make lock"
