"""Find the torch_dist directory that a path means, and the Hugging Face files that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from sfpo_megatron.checkpoints.remembered_shape import hold_to_shape
from sfpo_megatron.checkpoints.store import (
    LATEST,
    MEGATRON_TRACKER,
    RUN_STATE,
    CheckpointError,
    pointed_at,
    state_in,
)
from sfpo_megatron.config.paths import expand
from sfpo_megatron.convert.torch_dist import is_torch_dist
from sfpo_megatron.families.shape import ModelShape, model_shape, read_hf_config
from sfpo_megatron.outputs.directory import RunDirectory

HF_FILES = "hf"
"""The folder beside the weights into which the converter puts config.json and tokenizer."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Located:
    """A checkpoint on the disk."""

    kind: Literal["native", "megatron_lm"]
    directory: Path
    """The torch_dist directory."""


def locate(path: Path) -> Located:
    """The checkpoint that `path` is; of a folder with several, the one that its pointer names."""
    of_run = RunDirectory(path).checkpoints
    for candidate in (path, pointed_at(path), pointed_at(of_run)):
        if candidate is not None and is_torch_dist(candidate):
            native = (candidate / RUN_STATE).is_file()
            return Located(kind="native" if native else "megatron_lm", directory=candidate)
    raise CheckpointError(
        f"{path}: found no torch_dist checkpoint, expected a directory with .metadata and "
        f"metadata.json, or a folder with {MEGATRON_TRACKER} or `{LATEST}`; older formats of "
        "Megatron are converted by Megatron-LM's --ckpt-convert-format torch_dist"
    )


def companions_of(found: Located, hf: Path | None) -> tuple[Path, ModelShape]:
    """The directory with the model's config.json and tokenizer, `hf` or where it is found, and the
    shape of that model. CheckpointError where the run that wrote the checkpoint had another."""
    directory = hf or hf_files(found)
    shape = model_shape(read_hf_config(directory))
    fix = "give the directory of its own config.json with --hf"
    hold_to_shape(found.directory, shape, directory, fix=fix)
    return directory, shape


def hf_files(found: Located) -> Path:
    """The directory with the model's config.json: put there by the converter, or the model.path of
    the run that wrote the checkpoint. CheckpointError if there is neither."""
    directory = found.directory
    for folder in (directory, directory.parent):
        if (folder / HF_FILES / "config.json").is_file():
            return folder / HF_FILES
    # The checkpoint's own word first: since --fresh, config.yaml may be another run's.
    own = _own_model_path(directory)
    if own is not None and (own / "config.json").is_file():
        return own
    for folder in directory.parents[:2]:
        written = RunDirectory(folder).config
        if written.is_file():
            path = _model_path(written)
            if (path / "config.json").is_file():
                return path
            raise _no_model(written, path)
    if own is not None:
        raise _no_model(directory / RUN_STATE, own)
    raise CheckpointError(
        f"{directory}: found no {HF_FILES}/config.json beside it and no run's config.yaml, "
        "expected the model's config.json and tokenizer; give their directory with --hf"
    )


def _no_model(file: Path, path: Path) -> CheckpointError:
    """What to raise where the model.path that `file` names is not there."""
    return CheckpointError(
        f"{file}: found model.path {str(path)!r} without a config.json in {Path.cwd()}, "
        "expected the model of the run; start where the run was started, or give the "
        "directory of config.json and tokenizer with --hf"
    )


def _own_model_path(checkpoint: Path) -> Path | None:
    """The model.path in the config that a checkpoint holds, expanded already; None in one by
    others."""
    match state_in(checkpoint):
        case {"config": {"model": {"path": str(path)}}}:
            return Path(path)
    return None


def _model_path(written: Path) -> Path:
    """The model.path of a run's config.yaml; CheckpointError where it cannot be read."""
    try:
        config = yaml.safe_load(written.read_text(encoding="utf-8"))
        return Path(expand(config["model"]["path"]))
    except (
        *(OSError, ValueError, yaml.YAMLError, RecursionError),
        *(KeyError, TypeError, AttributeError),
    ) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{written}: found no model.path ({why}), expected the config as the run wrote it; "
            "restore it, or give the directory of config.json and tokenizer with --hf"
        ) from error
