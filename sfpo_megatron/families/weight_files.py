"""The weight files of a Hugging Face directory: one listing, for all who read it. No torch.

Loading, `check`, the refit's list of tensors, the engines' first weights and the converters take
the same files: those of the index, or model.safetensors. transformers looks for the single file
first and vLLM for the index, so a directory that has both and whose index names other files is
refused. Files that neither names are left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfpo_megatron.families.json_file import read_object
from sfpo_megatron.families.safetensors_header import (
    AGAIN,
    ModelFilesError,
    TensorEntry,
    read_header,
)
from sfpo_megatron.outputs.exported import WEIGHTS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LOAD_FORMAT = "sfpo_listed"
"""What vLLM calls a loader of this listing (resharding/transports/first_weights.py)."""
_NEVER = re.compile(r"consolidated.*|adapter_.*|optimizer.*", re.I)
"""Stems of *.safetensors that are no Hugging Face weights of the whole model."""
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_SHOWN = 5


@dataclass(kw_only=True, frozen=True, slots=True)
class WeightFiles:
    """Which files are a directory's weights."""

    directory: Path
    names: tuple[str, ...]
    missing: tuple[str, ...]
    """Files among `names` that are not there."""
    weight_map: dict[str, str]
    """Tensor -> file, as the index promises; empty without an index."""
    left_alone: tuple[str, ...]
    """Other files with weights, which nobody reads."""

    @property
    def paths(self) -> list[Path]:
        return [self.directory / name for name in self.names]

    def num_bytes(self) -> int:
        """Size of all of them on the disk."""
        return sum(path.stat().st_size for path in self.paths)

    def tensors(self) -> dict[str, TensorEntry]:
        """Name -> entry of every tensor, from the headers. ModelFilesError names a file that is
        missing or broken, a tensor in two files, and one that is not where the index says."""
        if self.missing:
            raise self.not_there()
        return self.tensors_there()

    def tensors_there(self) -> dict[str, TensorEntry]:
        """The same of those files that are there."""
        found: dict[str, TensorEntry] = {}
        for path in self.paths:
            if path.name in self.missing:
                continue
            for name, entry in read_header(path).items():
                if name in found:
                    raise ModelFilesError(
                        f"{name} in {found[name].file} and in {path.name} of {self.directory}",
                        "each tensor in one file",
                        "remove the file that is not the model's",
                    )
                found[name] = entry
        for name, file in self.weight_map.items():
            if file not in self.missing and (name not in found or found[name].file != file):
                raise ModelFilesError(
                    f"no {name} in {self.directory / file}",
                    f"that tensor there, as {INDEX} says",
                    "download the index and that file again, both of one version",
                )
        return found

    def not_there(self) -> ModelFilesError:
        """The error of `missing`."""
        source = f"that {INDEX} lists" if self.weight_map else "of the set"
        return ModelFilesError(
            f"{len(self.missing)} of {len(self.names)} weight files missing "
            f"({self.missing[0]}{'...' if len(self.missing) > 1 else ''}) in {self.directory}",
            f"every file {source}",
            "finish the download",
            not_there=len(self.missing) == len(self.names),
        )


def has_weights(directory: Path) -> bool:
    """Whether it is meant to be a model with weights, whole or not."""
    if not (directory / "config.json").is_file():
        return False
    return os.path.lexists(directory / INDEX) or any(directory.glob("*.safetensors"))


def weight_files(directory: Path) -> WeightFiles:
    """The weight files of `directory`, no header read; ModelFilesError where that is not clear."""
    index, single = directory / INDEX, directory / SINGLE
    weight_map: dict[str, str] = {}
    if os.path.lexists(index):
        weight_map = _read_index(index)
        names = tuple(sorted(set(weight_map.values())))
        if os.path.lexists(single) and names != (SINGLE,):
            others = ", ".join([name for name in names if name != SINGLE][:2])
            raise ModelFilesError(
                f"both {SINGLE} and {INDEX}, which names other files ({others}...), in {directory}",
                "one of the two: transformers takes the single file, engines those of the index",
                "remove the one that is not the model",
            )
    elif os.path.lexists(single):
        names = (SINGLE,)
    else:
        names = _without_index(directory)
    return WeightFiles(
        directory=directory,
        names=names,
        missing=tuple(name for name in names if not os.path.lexists(directory / name)),
        weight_map=weight_map,
        left_alone=tuple(_left_alone(directory, set(names))),
    )


def read_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor of `directory`, from the headers; ModelFilesError."""
    return weight_files(directory).tensors()


def _without_index(directory: Path) -> tuple[str, ...]:
    """Shards whose index is not there, as long as they are one set."""
    there = sorted(
        path.name
        for path in (directory.iterdir() if directory.is_dir() else ())
        if path.suffix == ".safetensors"
        and not _NEVER.fullmatch(path.stem)
        # Such as ._model.safetensors, which macOS puts into archives.
        and not path.name.startswith(".")
    )
    if not there:
        raise ModelFilesError(
            f"no *.safetensors in {str(directory)!r}{_instead(directory)}",
            "the model's weights",
            "download or convert them; only safetensors is read",
            not_there=True,
        )
    names = set(there)
    for match in filter(None, map(_NUMBERED.fullmatch, there)):
        total = min(int(match["total"]), 9999)
        names |= {
            f"{match['stem']}-{n + 1:05d}-of-{match['total']}.safetensors" for n in range(total)
        }
    return tuple(sorted(names))


def _instead(directory: Path) -> str:
    """What there is in their place."""
    others = list(_left_alone(directory, set()))
    return f" beside {some(others)}" if others else ""


def _left_alone(directory: Path, names: set[str]) -> Iterator[str]:
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name == "original" and path.is_dir():
            yield "original/"
        elif path.suffix in WEIGHTS and path.name not in names:
            yield path.name


def _read_index(index: Path) -> dict[str, str]:
    expected, fix = "an index with a weight_map of tensor: file", "download the index again"
    names = read_object(index, expected=expected, fix=fix).get("weight_map")
    if not isinstance(names, dict):
        raise ModelFilesError(f"no weight_map in {index}", expected, fix)
    if not names:
        raise ModelFilesError(f"an empty weight_map in {index}", expected, fix)
    for name, file in names.items():
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise ModelFilesError(
                f"{name}: {file!r} in {index}", "names of files beside the index", AGAIN
            )
    return names


def some(names: list[str]) -> str:
    """The first of `names`, for a message."""
    return ", ".join(names[:_SHOWN]) + ("..." if len(names) > _SHOWN else "")
