"""The command line: parse, validate, and only then import what is heavy.

`--help`, `check` and `plan` import none of torch, megatron, vllm, ray, transformers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from io import TextIOWrapper
from typing import Any, Literal

from sfpo_megatron import __version__
from sfpo_megatron.commands import demo
from sfpo_megatron.commands.check import add_options as add_check_options
from sfpo_megatron.commands.check import check
from sfpo_megatron.commands.install import add_options as add_install_options
from sfpo_megatron.commands.install import install
from sfpo_megatron.commands.report import add_options as add_report_options
from sfpo_megatron.commands.report import report as report_runs
from sfpo_megatron.commands.score import add_options as add_score_options
from sfpo_megatron.commands.score import score
from sfpo_megatron.commands.starting import load_for_run
from sfpo_megatron.commands.watching import add_mode, check_mode, options_of, screen_of_rank
from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.names import instead_of_word
from sfpo_megatron.config.rules.model import model_of
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.errors import InputError, WrongInput, may_pass, what_was_met
from sfpo_megatron.evaluation.request import add_options
from sfpo_megatron.host.home import NoHome
from sfpo_megatron.host.spans import span
from sfpo_megatron.host.torchrun import num_ranks, speaks
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import DirectoryRefused
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.report import report, with_data
from sfpo_megatron.slurm.command import add_options as add_slurm_options
from sfpo_megatron.slurm.command import slurm
from sfpo_megatron.tracking.screen import Mode

_LAUNCHED = "--launched"  # our launcher marks its ranks with it
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*\s*=")
_NO_OPTIONS = ("config", "overrides", "run", "needs_config", "launched")
"""What a parsed command line has beside its options."""
_OF_A_START = ("--fresh", "--accept-data-change")
"""What the launcher hands on to every rank."""
_INSTALLED_APART = ("torch", "megatron", "transformers", "vllm", "ray")
"""What the package does not ask pip for: which build is right, the machine says."""

Command = Literal["train", "sft"]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (the run failed, another has its output_dir,
    or a file system is away), 2 (the config or the data is wrong), 85 (stopped and saved:
    outputs/stopping.py), 128 + a signal's number (130: Ctrl-C)."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal without the letters of a text shows their codes: that ends no command.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = parse(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except WrongInput as error:
        from sfpo_megatron.launcher.rank import exit_code_of

        if speaks():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error)
    except OSError as error:
        if error.filename is None:  # nothing that the user has named
            raise
        if speaks():
            print(
                f"error: {InputError(str(error.filename), *what_was_met(error))}", file=sys.stderr
            )
        return 1 if may_pass(error) else 2
    except (DirectoryRefused, NoHome) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _INSTALLED_APART:
            raise
        print(
            f"error: {sys.executable} has no {package}: `sfpo-megatron install cpu` installs what "
            "a run needs, `sfpo-megatron install gpu` on machines with GPUs; or take the Python "
            "that has it",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command with its options and overrides, which may stand in any order after CONFIG."""
    parser = _parser()
    # argparse takes the overrides from one place only; those behind an option are left over.
    arguments, rest = parser.parse_known_args(argv)
    stray = [text for text in rest if text != "--"]
    if hasattr(arguments, "overrides"):
        words = [word for word in (arguments.config, *arguments.overrides, *stray) if word]
        arguments.config = _config_among(words)
        if arguments.config is not None:
            words.remove(arguments.config)
        elif arguments.needs_config:
            given = repr(" ".join(words))
            parser.error(f"found {given}, expected CONFIG, a YAML file, before KEY=VALUE")
        arguments.overrides = [text for text in words if _is_override(text)]
        stray = [text for text in words if not _is_override(text)]
    if stray:  # an option before what may be its value
        first = next((text for text in stray if text.startswith("-")), stray[0])
        parser.error(
            f"found {first!r}, expected an option of the command or KEY=VALUE; "
            f"{_instead_of(first, arguments)}"
        )
    return arguments


def _instead_of(text: str, arguments: argparse.Namespace) -> str:
    options = [name for name in vars(arguments) if name not in _NO_OPTIONS]
    meant = instead_of_word(text, options, has_keys=hasattr(arguments, "overrides"))
    if meant is None and text.startswith("--") and hasattr(arguments, "sbatch"):
        return f"an option of sbatch itself is given as --sbatch={text}"
    return meant or "`sfpo-megatron COMMAND --help` lists its options"


def _config_among(words: list[str]) -> str | None:
    """CONFIG, which may stand behind overrides; a file may have = in its name. Of several words it
    is the one that is a file: another may belong to an option that there is not."""
    if words and os.path.isfile(words[0]):
        return words[0]
    others = [text for text in words if not _OVERRIDE.match(text) and not text.startswith("-")]
    return next((text for text in others if os.path.isfile(text)), others[0] if others else None)


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _count(text: str) -> int:
    """Read an option that counts something."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sfpo-megatron",
        description="Train language models with SFPO on Megatron-Core and vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs: dict[Command, str] = {
        "train": "train with reinforcement learning (starts torchrun unless it runs under it)",
        "sft": "warm-start the model with next-token loss on data.train",
    }
    for name, text in runs.items():
        command = _config_command(commands, name, text)
        _add_fresh(command)
        _add_accept_data_change(command)
        add_mode(command)
        command.add_argument(_LAUNCHED, action="store_true", help=argparse.SUPPRESS)
        command.set_defaults(run=partial(_train, name))
    text = "accuracy of models on held-out problems, by engines alone"
    evaluation = _config_command(commands, "eval", text, optional=True)
    add_options(evaluation)
    evaluation.set_defaults(run=_eval)
    text = "validate a config, print it with every default filled in; starts nothing"
    checking = _config_command(commands, "check", text)
    checking.add_argument(
        "--world-size",
        type=_count,
        metavar="RANKS",
        help="as that many ranks under torchrun would find it when the run starts",
    )
    _add_fresh(checking)
    add_check_options(checking)
    checking.set_defaults(run=check)
    text = "make a run's job script in output_dir/slurm and hand it to sbatch"
    submitting = _config_command(commands, "slurm", text)
    add_slurm_options(submitting)
    _add_accept_data_change(submitting)
    submitting.set_defaults(run=slurm)
    _add_plan(commands)
    text = "score responses that are in a file; starts nothing else"
    scoring = _command(commands, "score", text)
    add_score_options(scoring)
    scoring.set_defaults(run=score)
    text = "make an HTML page of runs, side by side; starts nothing"
    reporting = _command(commands, "report", text)
    add_report_options(reporting)
    reporting.set_defaults(run=report_runs)
    text = "install what a run needs into the environment of this Python"
    installing = _command(commands, "install", text)
    add_install_options(installing)
    installing.set_defaults(run=install)
    text = "make a small policy, warm-start it and train it with SFPO, on two CPU cores"
    demonstration = _command(commands, "demo", text)
    demo.add_options(demonstration)
    demonstration.set_defaults(run=demo.run)
    text = "show versions, driver, devices, and what will be used here and why"
    doctor = _command(commands, "doctor", text)
    doctor.set_defaults(run=_doctor)
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command whose options are written out in full."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    return command


def _config_command(
    commands: Any, name: str, text: str, *, optional: bool = False
) -> argparse.ArgumentParser:
    """Add a command that reads a config file (`optional`: or none) and `key=value` overrides."""
    command = _command(commands, name, text)
    command.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if optional else None,
        help="a YAML file (see examples/)",
    )
    command.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="set one key, such as train.num_steps=10; the last of several on a key counts",
    )
    command.set_defaults(needs_config=not optional)
    return command


def _add_fresh(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fresh",
        action="store_true",
        help="begin a new run; what output_dir has of an earlier one is kept as *.previous-N",
    )


def _add_accept_data_change(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--accept-data-change",
        action="store_true",
        help="continue although the rows of data.train are not those of the checkpoint; what has "
        "changed is said, and kept in run.json",
    )


def _add_plan(commands: Any) -> None:
    text = "predict memory and seconds of a run, and a layout that fits; starts nothing"
    command = _config_command(commands, "plan", text)
    command.add_argument("--gpu", default="h100-80gb", choices=tuple(GPUS), help="of every node")
    command.add_argument("--nodes", type=_count, help="of 8 GPUs, engines included")
    command.set_defaults(run=_plan)


def _eval(arguments: argparse.Namespace) -> int:
    from sfpo_megatron.commands import evaluate

    return evaluate.run(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    config = with_data(load_config(arguments.config, arguments.overrides), arguments.nodes)
    # Its errors, of a run on GPUs; its warnings are of this machine.
    check_config(config, file=arguments.config, only_reads=True, on_cpu=False)
    shape = model_of(config, file=arguments.config)
    print(report(shape, config, GPUS[arguments.gpu], arguments.nodes), end="")
    return 0


def _train(command: Command, arguments: argparse.Namespace) -> int:
    """Run `train` or `sft`: as one rank under torchrun, else as the launcher of all ranks."""
    world_size = num_ranks()
    config = load_for_run(arguments, world_size=world_size, fills_batches=command == "train")
    check_mode(config, arguments.config, arguments.mode)
    directory = RunDirectory.of(config.output_dir)
    saves = config.saves_state if command == "train" else config.checkpoint.every > 0
    if world_size is None:
        from sfpo_megatron.launcher.launch import launch

        options = [option for option in _OF_A_START if _is_given(arguments, option)]
        options += options_of(arguments.mode)
        assert config.parallel.data is not None, "check_config refuses null outside torchrun"
        return launch(
            [command, _LAUNCHED, *options, arguments.config, *arguments.overrides],
            num_ranks=config.parallel.data * config.parallel.model_size,
            directory=directory,
            is_live=arguments.mode == "lines",
            saves_when_stopped=saves,
        )

    from sfpo_megatron.launcher.rank import run_rank

    return run_rank(
        partial(
            _run,
            command,
            config,
            arguments.mode,
            **{_name(option): _is_given(arguments, option) for option in _OF_A_START},
        ),
        directory=directory,
        launched=arguments.launched,
        saves_when_stopped=saves,
    )


def _name(option: str) -> str:
    return option.strip("-").replace("-", "_")


def _is_given(arguments: argparse.Namespace, option: str) -> bool:
    return bool(getattr(arguments, _name(option), False))


def _run(
    command: Command, config: RunConfig, mode: Mode, *, fresh: bool, accept_data_change: bool
) -> bool:
    """Run one rank; True if the run was asked to stop, and saved."""
    with screen_of_rank(mode):
        with span("import"):
            from sfpo_megatron.mcore.setup import init_distributed, shut_down

            capabilities = init_distributed(config)  # before anything imports megatron
            from sfpo_megatron.mcore.settings import hold_to_megatron

            hold_to_megatron(config, capabilities)
            if command == "sft":
                from sfpo_megatron.sft import run
            else:
                from sfpo_megatron.trainer import run
        stopped = run(config, capabilities, fresh=fresh, accept_data_change=accept_data_change)
    # A gloo thread that lets go of a tensor while Python ends aborts the process: a rank was seen
    # to end with SIGABRT after its last step. After an error there is nobody to wait for.
    shut_down()
    return stopped


def _doctor(arguments: argparse.Namespace) -> int:
    from sfpo_megatron.doctor import report

    print(report(), end="")
    return 0
