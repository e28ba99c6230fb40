"""Rules of check.py about files of rollouts: that of debug.save_rollouts is rewritten whole, that
of debug.train_only has all that the run trains on. No torch."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.safetensors_header import ModelFilesError, TensorEntry, read_header
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.outputs.directory import RunDirectory

_KEY, _READ_KEY = "debug.save_rollouts", "debug.train_only"
_NAME_ANOTHER = "name a file that debug.save_rollouts has written"
Level = Literal["error_when_training", "error_when_writing"]
_TENSOR = re.compile(r"(?:0|[1-9][0-9]{0,17})\.[a-z_]+")  # STEP.NAME
AT_ONCE = 2**20  # numbers of a tensor that are held at a time


def saved_rollouts(config: RunConfig) -> Iterator[Problem]:
    """Whether the file can be written, and replaces nothing but rollouts of an earlier start."""
    text = config.debug.save_rollouts
    if text is None:
        return
    file, read = Path(text), config.debug.train_only
    if read is not None and os.path.realpath(read) == os.path.realpath(file):
        yield _refused(f"{text!r}, which is debug.train_only", "another file than is read")
        return
    what = _in_its_place(file)
    if what is not None:
        yield _refused(what, "nothing there, or rollouts that this key has written")
        return
    folder = next(path for path in file.absolute().parents if os.path.lexists(path))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield _refused(
            f"{str(folder)!r}, where no file can be made",
            "a folder that can be written",
            "error_when_training",
        )


def _in_its_place(file: Path) -> str | None:
    """What stands at `file` and is not ours to replace."""
    if not os.path.lexists(file):
        return None
    if file.is_symlink() and not file.exists():
        return f"a link to nothing at {str(file)!r}"
    if not file.is_file():
        return f"a folder, or no regular file, at {str(file)!r}"
    try:
        names = read_header(file)
    except ModelFilesError:
        return f"a file that is no rollouts at {str(file)!r}"
    return (
        None if _are_rollouts(names) else f"a safetensors file that is no rollouts at {str(file)!r}"
    )


def _are_rollouts(names: Iterable[str]) -> bool:
    """Whether these tensors are those of `RolloutSaver`."""
    steps = {name.partition(".")[0] for name in names}
    ours = all(_TENSOR.fullmatch(name) for name in names)
    return bool(steps) and ours and all(f"{step}.numbers" in names for step in steps)


def _refused(found: str, expected: str, level: Level = "error_when_writing") -> Problem:
    return Problem(_KEY, found, expected, "choose another file", level)


# ---- debug.train_only --------------------------------------------------------------------------


def _to_read(text: str | None) -> dict[str, TensorEntry] | str | None:
    """The tensors of the rollouts to train on, or what the file is instead; None where there is no
    file, which `files.outputs` says."""
    if text is None or not Path(text).is_file():
        return None
    try:
        tensors = read_header(Path(text))
    except ModelFilesError as error:
        return error.found
    if not _are_rollouts(tensors):
        return f"a safetensors file that is no rollouts at {text!r}"
    return tensors


def read_rollouts(config: RunConfig) -> Iterator[Problem]:
    """Whether the file that is trained on has each train step, in rollouts that can be cut as the
    section train says."""
    text, num_steps = config.debug.train_only, config.train.num_steps
    tensors = _to_read(text)
    if isinstance(tensors, str):
        yield _unusable(_READ_KEY, tensors, "rollouts", _NAME_ANOTHER)
        return
    if text is None or tensors is None:
        return
    # A run that has begun may be past the first ones.
    first = num_steps if RunDirectory.of(config.output_dir).record.exists() else 1
    if num_steps is None or first is None:
        return  # `length` refuses epochs of saved rollouts
    saved = {int(name.partition(".")[0]) for name in tensors}
    if missing := next((n for n in range(first, num_steps + 1) if n not in saved), None):
        fix = f"set train.num_steps={missing - 1}" if missing > 1 else "name another file"
        yield _unusable(
            "train.num_steps",
            f"{num_steps} with {len(saved)} train steps in {text!r}",
            f"step {missing} among them",
            f"{fix}, or save more rollouts",
        )
        return
    with open(text, "rb") as stream:
        for step in range(first, num_steps + 1):
            yield from _cut(config, stream, step, tensors)


def _cut(
    config: RunConfig, stream: BinaryIO, step: int, tensors: dict[str, TensorEntry]
) -> Iterator[Problem]:
    """Whether the rollouts of a step make minibatches, and each has room in a microbatch."""
    train, context = config.train, config.parallel.context
    names = (f"{step}.prompt_lengths", f"{step}.response_lengths")
    prompts, responses = (_numbers(stream, tensors.get(name)) for name in names)
    where = f"train step {step} of {config.debug.train_only!r}"
    if len(prompts) % train.minibatches_per_step:
        yield _unusable(
            "train.minibatches_per_step",
            f"{train.minibatches_per_step} with the {len(prompts)} rollouts in {where}",
            "a divisor of their number",
            "change it, or save rollouts by this config",
        )
    longest = max(map(sum, zip(prompts, responses, strict=False)), default=0)
    if train.microbatch_size is None and train.max_tokens_per_microbatch * context < longest:
        yield _unusable(
            "train.max_tokens_per_microbatch",
            f"{train.max_tokens_per_microbatch} with a rollout of {longest} tokens in {where}",
            "room for each rollout",
            f"set it to {-(-longest // context)} or more",
        )


def rollout_tokens(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """A rule like `MODEL_RULES`: whether each token has a row in the model's embedding."""
    text = config.debug.train_only
    tensors = _to_read(text)
    if text is None or not isinstance(tensors, dict):
        return  # `read_rollouts` says why
    with open(text, "rb") as stream:
        for name, entry in tensors.items():
            step, _, what = name.partition(".")
            if what != "token_ids":
                continue
            for part in _parts(stream, entry):
                if bad := next((n for n in part if not 0 <= n < shape.vocab_size), None):
                    yield _unusable(
                        _READ_KEY,
                        f"token {bad} in train step {step} of {text!r}",
                        f"tokens below {shape.vocab_size}, the rows of the embedding in "
                        f"{config.model.path}",
                        "save the rollouts with this model",
                    )
                    return


def _numbers(stream: BinaryIO, entry: TensorEntry | None) -> array[int]:
    """The values of an int64 tensor; none if there is none."""
    found: array[int] = array("q")
    for part in _parts(stream, entry) if entry is not None else ():
        found.extend(part)
    return found


def _parts(stream: BinaryIO, entry: TensorEntry) -> Iterator[array[int]]:
    """The values of an int64 tensor, `AT_ONCE` at a time; none of one of another dtype."""
    for first in range(0, entry.num_bytes if entry.dtype == "I64" else 0, 8 * AT_ONCE):
        stream.seek(entry.first_byte + first)
        part: array[int] = array("q")
        part.frombytes(stream.read(min(8 * AT_ONCE, entry.num_bytes - first)))
        yield part


def _unusable(key: str, found: str, expected: str, fix: str) -> Problem:
    return Problem(key, found, expected, fix, "error_when_filling")
