"""`sfpo-megatron eval`'s options as a config: each is an override of a key, so that a file, options
and overrides say the same things in the same words. No torch."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sfpo_megatron.config.check import has_cuda
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.config.origin import COMMAND_LINE
from sfpo_megatron.config.overrides import override_of
from sfpo_megatron.config.paths import escape, from_option
from sfpo_megatron.config.source_files import ENDINGS
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.evaluation.models import Model, find_model
from sfpo_megatron.evaluation.records import EvaluationError
from sfpo_megatron.families.json_file import read_object
from sfpo_megatron.families.safetensors_header import ModelFilesError
from sfpo_megatron.families.shape import UnsupportedModel, model_shape, read_hf_config

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_MATH = ("math", BOXED)
BENCHMARKS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("math500", "aime24", "aime25", "amc", "minerva", "olympiadbench", "gsm8k"), _MATH
    ),
    "gsm_symbolic": ("last_number", ""),
}
"""Name -> its reward and the suffix of its prompts. reasoning-gym makes gsm_symbolic, the others
are files of tools/prepare_data.py."""
_GENERATED_SIZE = 500
_MOST_TOKENS = 2048


@dataclass(kw_only=True, frozen=True, slots=True)
class Request:
    """What is to be evaluated."""

    models: tuple[Model, ...]
    config: RunConfig
    """The same for every model, but for model.path; everything is written into its output_dir."""
    fresh: bool
    """Records that are there are set aside."""
    as_json: bool
    """stdout gets JSON alone."""
    quiet: bool
    """stderr gets warnings, errors and the table alone."""


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    command.add_argument(
        "--model",
        action="append",
        type=from_option,
        metavar="MODEL",
        help="a Hugging Face directory, a checkpoint or a run, in place of the config's "
        "model.path; several are compared on the same problems",
    )
    command.add_argument(
        "--checkpoint", choices=("best", "last"), default="last", help="of a run (default: last)"
    )
    command.add_argument(
        "--data",
        type=_names,
        metavar="NAMES",
        help=f"benchmarks ({', '.join(BENCHMARKS)}) and jsonl or parquet files, with commas "
        "between them, in place of data.eval",
    )
    command.add_argument(
        "--data-dir",
        type=from_option,
        default="data",
        metavar="DIR",
        help="where tools/prepare_data.py has put the benchmarks (default: data)",
    )
    command.add_argument("--n", type=int, metavar="N", help="samples a problem (eval.n)")
    command.add_argument("--temperature", type=float, help="0 is greedy (eval.temperature)")
    command.add_argument("--top-p", type=float, help="nucleus sampling mass (eval.top_p)")
    command.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a response (eval.max_response_tokens)"
    )
    command.add_argument(
        "--reward", metavar="NAME", help="a verifier, or a list for a sum (reward.function)"
    )
    command.add_argument("--prompt-suffix", metavar="TEXT", help="data.prompt_suffix")
    command.add_argument(
        "--out", type=from_option, metavar="DIR", help="output_dir (default: runs/eval)"
    )
    command.add_argument("--json", action="store_true", help="print nothing but JSON on stdout")
    command.add_argument(
        "--quiet", action="store_true", help="print warnings, errors and the results alone"
    )
    command.add_argument(
        "--fresh", action="store_true", help="evaluate again: set aside what --out has"
    )


def _names(text: str) -> str:
    """`--data`, in each of whose files `~` may stand."""
    return ",".join(from_option(name) if name else "" for name in map(str.strip, text.split(",")))


def request_of(arguments: argparse.Namespace) -> Request:
    """The request that the command line makes; ConfigError or EvaluationError if it makes none."""
    path: str | None = arguments.config
    if path is None and not (arguments.model and arguments.data):
        raise ConfigError(
            COMMAND_LINE,
            "eval",
            found="no CONFIG" + ("" if arguments.model else ", no --model"),
            expected="a config, or a model and data: --model DIR --data math500",
            fix="give a config from examples/, or both options",
        )
    models = tuple(find_model(text, arguments.checkpoint) for text in arguments.model or ())
    options = _options(arguments, models, has_file=path is not None)
    # Without the trainer's layout: none is started, and there is nobody to share devices with.
    alone = {"parallel": {}, "rollout.placement": "dedicated"}
    before, after = (
        [override_of(key, value) for key, value in part.items()] for part in (options, alone)
    )
    config = load_config(path, [*before, *arguments.overrides, *after])
    return Request(
        models=models or (find_model(config.model.path, arguments.checkpoint),),
        config=config,
        fresh=arguments.fresh,
        as_json=arguments.json,
        quiet=arguments.quiet,
    )


def _options(
    arguments: argparse.Namespace, models: tuple[Model, ...], *, has_file: bool
) -> dict[str, Any]:
    """Config key -> value of every option that was given, and of what a missing file leaves out."""
    found = {
        "output_dir": None if arguments.out is None else escape(arguments.out),
        "eval.n": arguments.n,
        "eval.temperature": arguments.temperature,
        "eval.top_p": arguments.top_p,
        "eval.max_response_tokens": arguments.max_tokens,
        "reward.function": _reward(arguments.reward),
        "data.prompt_suffix": arguments.prompt_suffix,
    }
    options = {} if has_file else _defaults(models[0], arguments.max_tokens)
    if models:
        options["model.path"] = escape(str(models[0].hf))
    if arguments.data is not None:
        options |= _data(arguments.data, Path(arguments.data_dir), arguments.reward)
        if not has_file:
            options["data.train"] = options["data.eval"]  # a config has some; nothing reads it
    return options | {key: value for key, value in found.items() if value is not None}


def _reward(text: str | None) -> Any:
    """A name as it is; a list is a weighted sum."""
    if text is None or not text.lstrip().startswith("["):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvaluationError(
            f"--reward: found {text!r}, expected a name, or a list such as "
            "[{name: math}, {name: format, weight: 0.1}]"
        ) from error


def _data(names: str, folder: Path, reward: str | None) -> dict[str, Any]:
    """The sources of `--data`, and the rewards and the suffix that benchmarks bring: the suffix is
    one for all, and that which asks for a box leaves the last number the last."""
    sources: list[dict[str, Any]] = []
    rewards: dict[str, dict[str, Any]] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name in BENCHMARKS:
            sources.append(_benchmark(name, folder))
            rewards[name] = sources[-1]
        elif kind := next((kind for kind, ends in ENDINGS.items() if name.endswith(ends)), None):
            sources.append({"source": kind, "path": escape(name)})
        else:
            raise EvaluationError(
                f"--data: found {name!r}, expected one of {', '.join(BENCHMARKS)}, or a file whose "
                f"name ends with {', '.join(end for ends in ENDINGS.values() for end in ends)}"
            )
    if not sources:
        raise EvaluationError(f"--data: found {names!r}, expected benchmarks or files")
    found: dict[str, Any] = {"data.eval": sources}
    if rewards:
        first, *_ = (BENCHMARKS[name][0] for name in rewards)
        found["reward.function"] = first
        found["data.prompt_suffix"] = max((BENCHMARKS[name][1] for name in rewards), key=len)
        for name, source in rewards.items():
            if reward is None and BENCHMARKS[name][0] != first:
                source["reward"] = BENCHMARKS[name][0]
    return found


def _benchmark(name: str, folder: Path) -> dict[str, Any]:
    if name == "gsm_symbolic":
        return {"source": "reasoning_gym", "task": name, "size": _GENERATED_SIZE}
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise EvaluationError(
            f"--data: found no {path}, expected the problems of {name}; make it with "
            f"`python tools/prepare_data.py --downloads downloads --out {folder} {name}`, which "
            "says what to download"
        )
    return {"source": "parquet", "path": escape(str(path))}


def _defaults(model: Model, max_tokens: int | None) -> dict[str, Any]:
    """What a config file would say: lengths that the model can take, its dtype, its template."""
    try:
        config = read_hf_config(model.hf)
        most = model_shape(config).max_context
    except (UnsupportedModel, ValueError) as error:
        raise EvaluationError(f"--model {model.name}: {error}") from error
    response = max_tokens or min(_MOST_TOKENS, most * 3 // 4)
    if response >= most:
        raise EvaluationError(
            f"--max-tokens: found {response}, expected fewer than the model has positions ({most})"
        )
    dtype = config.get("dtype") or config.get("torch_dtype")
    known = dtype in ("float32", "bfloat16", "float16")
    return {
        "output_dir": os.path.join("runs", "eval"),
        "model.dtype": dtype if has_cuda() and known else "float32",
        "rollout.max_response_tokens": response,
        "rollout.max_prompt_tokens": min(_MOST_TOKENS, most - response),
        "data.chat_template": _has_chat_template(model.hf),
        "reward.function": "math",
        "reward.num_workers": max(1, min(8, (os.cpu_count() or 2) // 2)),
    }


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return False
    try:
        found = read_object(settings, fix="restore the model's tokenizer_config.json")
    except ModelFilesError as error:
        raise EvaluationError(f"--model {folder}: {error}") from error
    return bool(found.get("chat_template"))
