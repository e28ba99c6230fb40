"""The files of the model directory: there, whole, and those of one model. Headers only, no weights.

What is there and broken is an error; what is not there yet is one only for a run that starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sfpo_megatron.config.paths import looks_like_path
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.demo import RUN
from sfpo_megatron.errors import LATER, may_pass
from sfpo_megatron.families.hf_config import HFConfig
from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES
from sfpo_megatron.families.safetensors_header import ModelFilesError, NotAFile, impostor, opened
from sfpo_megatron.families.shape import ModelShape, read_hf_config
from sfpo_megatron.families.weight_files import weight_files
from sfpo_megatron.families.weight_names import check_tensors
from sfpo_megatron.outputs.directory import RunDirectory

_KEY = "model.path"
_DIRECTORY = "a Hugging Face model directory"
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def not_a_directory(text: str) -> Problem | None:
    """What is wrong with model.path itself: a path to nothing, a file, a folder that is closed."""
    path = Path(text)
    if path.is_symlink() and not path.exists():
        return Problem(
            _KEY, f"a link to nothing at {text!r} (-> {os.readlink(path)})", _DIRECTORY,
            "correct the link or the path",
        )  # fmt: skip
    if not path.exists():
        return _nowhere(text)
    if not path.is_dir():
        return Problem(
            _KEY, f"a file, not a directory, at {text!r}", _DIRECTORY,
            "point model.path at the folder that holds config.json",
        )  # fmt: skip
    if not os.access(path, os.R_OK | os.X_OK):
        return Problem(
            _KEY, f"{text!r}, which this user may not read", _DIRECTORY, "change its permissions"
        )
    return None


def _nowhere(text: str) -> Problem:
    found = f"no directory {text!r} in {Path.cwd()}"
    if os.path.isabs(text):
        found = f"no directory {text!r}"
    if looks_like_path(text):
        return Problem(_KEY, found, _DIRECTORY, f"correct the path, or {_what_makes(text)}")
    return Problem(
        _KEY, f"{found}, nor is the hub id {text!r} on this machine",
        "a model directory on this machine",
        "correct the path, or download the model and give its directory; its sizes are not "
        "checked until then",
        "error_when_training",
    )  # fmt: skip


def _what_makes(text: str) -> str:
    """How the model that is to be at the path `text` comes there."""
    path = Path(os.path.normpath(text))
    if path.is_relative_to(RUN):
        return "make it first: `sfpo-megatron demo` does"
    if path != RunDirectory(path.parent).hf:
        return "put the model there first (tools/make_tiny_model.py makes a small random one)"
    if path.parent.name == "warm_start":
        given = f"output_dir={path.parent} model.path=MODEL"
        return f"make it first: `sfpo-megatron sft CONFIG {given}` does"
    return f"wait for the run in {str(path.parent)!r}, which writes it when it ends"


def config_json(path: Path) -> Problem | HFConfig:
    """The config.json of the directory `path`, or why it cannot be read."""
    file = path / "config.json"
    try:
        os.lstat(file)
    except FileNotFoundError:
        what, fix = "no config.json", "point model.path at the folder that holds config.json"
        if (path / "adapter_config.json").exists():
            what, fix = "an adapter (adapter_config.json), not a model,", "merge it into its base"
        return Problem(_KEY, f"{what} in {str(path)!r}", _DIRECTORY, fix)
    except OSError:
        pass  # the reader says so
    try:
        config = read_hf_config(path)
    except ModelFilesError as error:
        return problem_of(error)
    return next(_elsewhere(file, config), config)


def _elsewhere(file: Path, config: HFConfig) -> Iterator[Problem]:
    """A model whose code or weights are not the ones that are read here."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if config.get("auto_map") and name not in SUPPORTED_ARCHITECTURES:
        yield Problem(
            _KEY,
            f"architecture {name} with code of its own (auto_map) in {file}",
            f"one of {', '.join(SUPPORTED_ARCHITECTURES)}",
            "choose a model of these families: a model's own code is never run",
        )
    if (other := config.get("transformers_weights")) is not None:
        yield Problem(
            _KEY,
            f"transformers_weights {other!r} in {file}",
            "no such key: it makes transformers read other files than the engines",
            "remove it, and the weights that are not the model's",
        )


def pointers(path: Path) -> Iterator[Problem]:
    """Files beside the weights that were not downloaded but have something in their place."""
    for name in _BESIDE:
        file = path / name
        try:
            with opened(file) as stream:
                start = stream.read(256)
        except NotAFile as error:
            yield Problem(_KEY, f"{error.strerror} at {file}", "JSON", "put the file there")
            continue
        except OSError:
            continue  # not there: who needs it says so
        if not start.lstrip().startswith((b"{", b"[")) and (other := impostor(start)):
            yield Problem(_KEY, f"{other[0]} at {file}", "JSON", other[1])


def weights(path: Path, shape: ModelShape) -> Iterator[Problem]:
    """What of the weight files could not be loaded as config.json's model."""
    try:
        files = weight_files(path)
        if files.missing:
            yield problem_of(files.not_there())
        tensors = files.tensors_there()
        if not files.missing:
            check_tensors(path, tensors, shape)
    except ModelFilesError as error:
        yield problem_of(error)
    except OSError as error:
        found = f"{error.strerror} at {error.filename}"
        fix = LATER if may_pass(error) else "change their permissions"
        yield Problem(_KEY, found, "files that can be read", fix, cause=error)
    else:
        if files.left_alone:
            yield Problem(
                _KEY,
                f"files that are not read ({', '.join(files.left_alone[:5])}) in {str(path)!r}",
                f"{'the files of the index' if files.weight_map else ', '.join(files.names[:2])} "
                "only",
                "nothing to do if these are not the model",
                "warning",
            )


def problem_of(error: ModelFilesError) -> Problem:
    """What a rule says of a file that cannot be used."""
    return Problem(
        _KEY,
        error.found,
        error.expected,
        LATER if may_pass(error) else error.fix,
        "error_when_training" if error.not_there else "error",
        cause=error,
    )
