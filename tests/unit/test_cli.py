"""The command line as a process: help, check, torchrun's environment, and the wheel alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from made.configs import write_run

from sfpo_megatron import __version__, cli
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config
from sfpo_megatron.errors import InputError
from sfpo_megatron.outputs.directory import RunDirectory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    model_dir()
    write_run()
    return tmp_path


def sfpo(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sfpo_megatron", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )


@pytest.mark.parametrize("command", ["--help", "check --help", "eval --help", "plan --help"])
def test_help_imports_nothing_heavy(command: str) -> None:
    """What takes a second or more to import stays out; seconds are no matter for a test."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['sfpo-megatron', *{command.split()!r}]\n"
        "try:\n    runpy.run_module('sfpo_megatron', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = 'torch numpy megatron vllm ray transformers sympy pyarrow safetensors'.split()\n"
        "print(*[name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "", "imported by --help"
    assert "--launched" not in done.stdout
    if command == "--help":
        assert all(name in done.stdout for name in ("train", "sft", "check", "doctor"))


def test_help_of_slurm_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that depend on the config, as docs/slurm.md has them."""
    with pytest.raises(SystemExit):
        cli.main(["slurm", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "with parallel.data null, what the engines leave" in text
    assert "(default: checkpoint.must_save_within_s, else checkpoint.stop_" in text


def test_check_prints_a_config_that_loads(here: Path) -> None:
    done = sfpo("check", "run.yaml", "train.num_steps=7", "train.optimizer.lr=1e-5")
    assert done.returncode == 0, done.stderr
    assert "warning: run.yaml: data.eval: found no source" in done.stderr
    Path("resolved.yaml").write_text(done.stdout)
    expected = load_config("run.yaml", ["train.num_steps=7", "train.optimizer.lr=1e-5"])
    assert load_config("resolved.yaml") == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["run.yaml", "seed=3", "train.num_steps=7", "--world-size", "1"],
        ["run.yaml", "--world-size", "1", "seed=3", "train.num_steps=7"],
        ["run.yaml", "seed=3", "--world-size=1", "train.num_steps=7"],
        ["--world-size", "1", "run.yaml", "seed=3", "train.num_steps=7"],
        ["run.yaml", "seed=9", "--world-size", "1", "seed=3", "train.num_steps=7"],
        ["run.yaml", "--world-size", "1", "--", "seed=3", "train.num_steps=7"],
    ],
)
def test_options_and_overrides_stand_in_any_order(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """The last of two overrides of a key counts, as in one place."""
    assert cli.main(["check", *arguments]) == 0
    Path("resolved.yaml").write_text(capsys.readouterr().out)
    assert load_config("resolved.yaml") == load_config("run.yaml", ["seed=3", "train.num_steps=7"])


@pytest.mark.parametrize("stray", ["seed", "--world-siz=1", "--fast", "-x=1", "--world_size"])
def test_what_is_neither_option_nor_override_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], stray: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "run.yaml", "--world-size", "1", stray])
    assert ended.value.code == 2
    assert f"found {stray!r}, expected an option of the command or KEY=VALUE" in (
        capsys.readouterr().err
    )


def test_a_command_without_a_config_takes_no_overrides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "seed=3"])
    assert "found 'seed=3'" in capsys.readouterr().err


def test_torchrun_ranks_report_a_wrong_config_once(here: Path) -> None:
    """All exit with 2; rank 0 alone says why. The world size is torchrun's."""
    done = {
        rank: sfpo("train", "run.yaml", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        for rank in ("0", "1")
    }
    assert [d.returncode for d in done.values()] == [2, 2]
    assert "error: run.yaml: parallel: found 2 ranks, expected 1 (data 1 x" in done["0"].stderr
    assert done["1"].stderr == ""


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
        {"RANK": "1", "WORLD_SIZE": "two", "LOCAL_RANK": "1"},
    ],
)
def test_what_a_container_has_set_is_no_torchrun(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    left: dict[str, str],
) -> None:
    """The error is said, and `train` starts the ranks itself."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["check", "run.yaml", "sede=1"]) == 2
    assert "error: command line: sede: found an unknown key" in capsys.readouterr().err
    assert cli.main(["check", "run.yaml"]) == 0
    assert "train begins a new run" in capsys.readouterr().err
    monkeypatch.setattr("sfpo_megatron.launcher.launch.launch", lambda *_, **__: 5)
    assert cli.main(["train", "run.yaml"]) == 5


@pytest.mark.parametrize("command", ["train", "sft"])
def test_launcher_gets_the_ranks_that_parallel_asks_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    calls: list[tuple[list[str], dict[str, object]]] = []

    def launch(arguments: list[str], **rest: object) -> int:
        calls.append((arguments, rest))
        return 5

    monkeypatch.setattr("sfpo_megatron.launcher.launch.launch", launch)
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2"]
    assert cli.main([command, "run.yaml", *overrides]) == 5
    ((arguments, rest),) = calls
    assert arguments == [command, "--launched", "run.yaml", *overrides]
    saves = {"saves_when_stopped": True, "is_live": True}
    assert rest == {"num_ranks": 8, "directory": RunDirectory(here / "run")} | saves
    assert cli._parser().parse_args(arguments).launched


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_ranks_hear_what_stdout_is_to_get(
    here: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    calls: list[tuple[list[str], object]] = []

    def launch(arguments: list[str], *, is_live: bool, **rest: object) -> int:
        calls.append((arguments, is_live))
        return 5

    monkeypatch.setattr("sfpo_megatron.launcher.launch.launch", launch)
    assert cli.main(["train", "run.yaml", option, "--fresh"]) == 5
    assert calls == [(["train", "--launched", "--fresh", option, "run.yaml"], False)]


def test_json_without_the_console_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "run.yaml", "--json", "tracking.sinks=[jsonl]"]) == 2
    said = capsys.readouterr().err
    assert "tracking.sinks: found jsonl, expected console among them" in said
    with pytest.raises(SystemExit):
        cli.main(["train", "run.yaml", "--json", "--quiet"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_unknown_command_and_no_command() -> None:
    assert sfpo("tarin").returncode == 2
    assert sfpo().returncode == 2


def test_version() -> None:
    assert sfpo("--version").stdout == f"sfpo-megatron {__version__}\n"


def test_doctor_says_what_will_be_used(here: Path) -> None:
    done = sfpo("doctor")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"torch {version('torch')}" in lines
    assert f"megatron-core {version('megatron-core')}" in lines
    for fact in (
        *("InfiniBand", "torch build", "huge pages", "limits locked memory", "compiler"),
        *("shared memory", "address", "layer spec", "optimizer", "norm", "attention", "fusions"),
        *("collectives", "model runner"),
    ):
        assert any(line.startswith(f"{fact} ") for line in lines), fact


def test_doctor_says_what_ails_torch(here: Path) -> None:
    """A library that it loads is missing, as on an image for other drivers: no ImportError."""
    (here / "broken/torch").mkdir(parents=True)
    said = "libcudart.so.13: cannot open shared object file:\\n  No such file"
    (here / "broken/torch/__init__.py").write_text(f"raise OSError('{said}')\n")
    done = sfpo("doctor", PYTHONPATH=f"{here / 'broken'}:{ROOT}")
    assert (done.returncode, done.stderr) == (0, "")
    found = "cannot be imported: libcudart.so.13: cannot open shared object file: No such file\n"
    lines = done.stdout.splitlines(keepends=True)
    assert [line.split(maxsplit=1) for line in lines if line.endswith(found)] == [
        ["torch", found],
        ["unknown", f"here  torch {found}"],
    ]


@pytest.mark.parametrize(("name", "is_named"), [("torch", True), ("mine", False)])
def test_what_a_run_needs_and_python_has_not(here: Path, name: str, is_named: bool) -> None:
    """Anything else that cannot be imported is a fault, with its traceback."""
    (here / "away").mkdir()
    missing = f"raise ModuleNotFoundError({name!r}, name={name!r})"
    (here / "away/torch.py").write_text(missing)
    ended = sfpo("train", "run.yaml", PYTHONPATH=str(here / "away"))
    assert ended.returncode == 1
    line = f"error: {sys.executable} has no torch: `sfpo-megatron install cpu` installs what"
    assert (ended.stderr.splitlines()[-1].startswith(line)) is is_named, ended.stderr
    assert ("Traceback" in ended.stderr) is not is_named


def test_wheel_alone_gives_help_check_and_a_job_script(here: Path) -> None:
    """Built, unpacked into an empty folder, run by a Python that sees nothing else but PyYAML."""
    import yaml

    # From a copy: a build/ folder of the checkout would put deleted files into the wheel.
    source = here / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "sfpo_megatron"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    build += ["--disable-pip-version-check", "-w", str(here / "dist"), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (here / "dist").glob("*.whl")
    assert wheel.name == f"sfpo_megatron-{__version__}-py3-none-any.whl"
    site = here / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        info = f"sfpo_megatron-{__version__}.dist-info"
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "sfpo-megatron = sfpo_megatron.__main__:main" in points
    assert "[vllm.general_plugins]" in points
    assert "Requires-Dist: PyYAML>=6\n" in metadata
    assert all(f"Provides-Extra: {extra}\n" in metadata for extra in ("gpu", "log", "dev"))
    packaged = {p.relative_to(site).as_posix() for p in site.rglob("sfpo_megatron/**/*.py")}
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("sfpo_megatron/**/*.py")} == packaged
    for file, of in {
        "demo/config.yaml": "examples/demo",
        "slurm/templates/env.sh": "launch/slurm",
    }.items():
        carried = site / "sfpo_megatron" / file
        assert carried.read_bytes() == (ROOT / of / carried.name).read_bytes()
    (site / "yaml").symlink_to(Path(yaml.__file__).parent)
    # -S: no site-packages; -P and the folder: nothing from the checkout either.
    slurm = ["slurm", "run.yaml", "--nodes=4", "--time=4:00:00", "--dry-run"]
    outputs = []
    install = ["install", "cpu", "--dry-run"]
    for arguments in (
        ["--help"],
        ["doctor"],
        ["check", "run.yaml"],
        slurm,
        install,
        ["demo", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-S", "-P", "-m", "sfpo_megatron", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"]},
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "task: chain_sum" in outputs[2]
    assert outputs[3].startswith("#!/usr/bin/env bash\n") and "--nodes=4\n" in outputs[3]
    locked = next(line for line in outputs[4].splitlines() if "--require-hashes" in line)
    assert Path(locked.split()[-1]).is_relative_to(site) and Path(locked.split()[-1]).is_file()
    assert not Path("run").exists(), "a dry run writes nothing"


def test_what_only_megatron_refuses_is_said_before_the_run_opens(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines would have begun to start, and RUN to be written."""
    from sfpo_megatron import sft, trainer
    from sfpo_megatron.mcore import setup
    from sfpo_megatron.mcore.capabilities import Capabilities

    found = Capabilities(
        cuda=False, transformer_engine=None, apex=False, layers="local", adam="torch"
    )
    monkeypatch.setattr(setup, "init_distributed", lambda config: found)
    for module in (trainer, sft):
        monkeypatch.setattr(module, "run", lambda *rest, **named: pytest.fail("it was opened"))
    settings = 'megatron.transformer={"delay_wgrad_compute": true}'
    config = load_config("run.yaml", [settings])
    check_config(config, file="run.yaml")
    for command in ("train", "sft"):
        with pytest.raises(InputError) as caught:
            cli._run(command, config, "quiet", fresh=False, accept_data_change=False)
        assert str(caught.value).startswith(
            "megatron.transformer: found {'delay_wgrad_compute': True}, expected what "
            "TransformerConfig of this megatron-core takes (AssertionError: "
        )
    assert sorted(path.name for path in here.iterdir()) == ["model", "run.yaml"]
