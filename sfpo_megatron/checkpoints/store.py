"""The folder of a run's checkpoints: each is whole or absent, the newest good one is found, and old
ones are removed once a newer one has been verified. No torch; rank 0 alone writes here.

    RUN/checkpoints/step_0000050/       native, or iter_0000050/ (megatron_lm)
    RUN/checkpoints/latest              its name; latest_checkpointed_iteration.txt (megatron_lm)
    RUN/checkpoints/best                the name of the best one
    RUN/checkpoints/.writing-.../       not a checkpoint yet
    RUN/checkpoints/.removing-NAME/     not one any more: retention has not got through it yet
    RUN/checkpoints/NAME.broken-1/      one that did not hold when a run wanted to continue from it
    RUN/checkpoints/NAME.removed-1/     what others had put into one that retention has removed
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfpo_megatron.checkpoints import manifest
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.listing import paths_in
from sfpo_megatron.host.replacing import set_aside, sync_directory, write_durably
from sfpo_megatron.outputs.directory import RunDirectory

Format = Literal["native", "megatron_lm"]
LATEST, BEST = "latest", "best"
"""Files with the name of a checkpoint beside them."""
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
RUN_STATE = "run_state.json"
_PREFIX: dict[Format, str] = {"native": "step", "megatron_lm": "iter"}
_NAME = re.compile(r"(step|iter)_(\d{7,})")
_REPLACED = re.compile(rf"{_NAME.pattern}\.replaced-\d+")
_ASIDE, _REMOVING, _BROKEN, _RETIRED = ".writing-", ".removing-", ".broken-", "previous"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read: which, what was found, what to do."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Found:
    """A checkpoint to continue from."""

    directory: Path
    step: int
    has_run_state: bool
    """False for one by Megatron-LM, which only gives the weights."""


class CheckpointStore:
    """The checkpoints of one run, in `folder`; the module's docstring has the layout."""

    def __init__(self, folder: Path, *, form: Format, keep_last: int, keep_best: bool) -> None:
        self.folder = folder
        self._form = form
        self._keep_last = keep_last
        self._keep_best = keep_best

    def steps(self) -> dict[int, Path]:
        """Train step -> directory of every checkpoint, oldest first; of either format.
        CheckpointError if the folder cannot be listed: whether there are any is not known."""
        found = {}
        for path in self._named():
            if _is_ours(path):
                found[step_of(path)] = path
        return dict(sorted(found.items()))

    def others(self) -> list[Path]:
        """Checkpoints that no run has written: neither continued from nor removed."""
        return [path for path in self._named() if not _is_ours(path)]

    def _named(self) -> list[Path]:
        with _readable(self.folder):
            there = paths_in(self.folder)
            return [path for path in there if _NAME.fullmatch(path.name) and path.is_dir()]

    def _broken(self) -> list[Path]:
        """Those that did not hold when a run wanted to continue from them."""
        with _readable(self.folder):
            return [path for path in paths_in(self.folder) if _BROKEN in path.name]

    def _replaced(self) -> list[Path]:
        """Those whose name another of the same step has taken, or was about to take."""
        with _readable(self.folder):
            return [path for path in paths_in(self.folder) if _REPLACED.fullmatch(path.name)]

    def begin(self, step: int) -> Path:
        """Make an empty directory to write a checkpoint into; what an ended run left is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in paths_in(self.folder, begin=_ASIDE):
            shutil.rmtree(left, ignore_errors=True)
        aside = self.folder / f"{_ASIDE}{self._name(step)}"
        aside.mkdir()
        return aside

    def commit(self, aside: Path, step: int, known: dict[str, manifest.FileDigest]) -> Path:
        """Make what is in `aside` the checkpoint of `step`, in one rename, and the latest one."""
        manifest.write_manifest(aside, step, known)
        sync_directory(aside)
        directory = self.folder / self._name(step)
        if directory.exists():  # of an earlier course of this run, or the same state once more
            set_aside(directory, "replaced" if _is_ours(directory) else "previous")
        aside.rename(directory)
        sync_directory(self.folder)
        self._point(directory)
        return directory

    def recover(self) -> None:
        """Give a replaced checkpoint its name back where a kill came before the new one had it."""
        with _readable(self.folder):
            for path in reversed(self._replaced()):
                there = path.with_suffix("")
                if not os.path.lexists(there):
                    path.rename(there)

    def _point(self, directory: Path) -> None:
        write_durably(self.folder / LATEST, directory.name + "\n")
        if directory.name.startswith(_PREFIX["megatron_lm"]):
            write_durably(self.folder / MEGATRON_TRACKER, f"{step_of(directory)}\n")

    def mark_best(self, directory: Path) -> None:
        """Record that this checkpoint is the best one so far."""
        write_durably(self.folder / BEST, directory.name + "\n")

    @property
    def best(self) -> Path | None:
        """The checkpoint that is marked; None where there is none, or it has been removed."""
        best = pointed_at(self.folder, BEST)
        there = best is not None and _NAME.fullmatch(best.name) and best.is_dir()
        return best if there else None

    def prune(self) -> list[Path]:
        """Remove what retention does not keep, after reading the newest checkpoint back from the
        disk; CheckpointError, and nothing is removed, if it does not hold. What others have put
        into a checkpoint, or there in its place (a link), stays. What a kill has left of an earlier
        removal goes too."""
        directories = list(self.steps().values())
        newest = directories[-self._keep_last :]
        kept = {*newest, self.best if self._keep_best else None}
        leaving = [path for path in directories if path not in kept]
        leaving += self._replaced()
        if newest and (problems := _faults(newest[-1], drop_cache=True)):
            raise CheckpointError(
                f"checkpoint {newest[-1].name} does not hold what was written: {problems[0]}; "
                "older ones are kept; check the disk"
            )
        leaving = [path for path in leaving if path.is_dir() and not path.is_symlink()]
        for path in leaving:
            _begin_removal(path)
        for path in paths_in(self.folder, begin=_REMOVING):
            shutil.rmtree(path)
        return leaving

    def abandon(self, aside: Path) -> None:
        """Remove an unfinished checkpoint, which frees its space."""
        shutil.rmtree(aside, ignore_errors=True)

    def _name(self, step: int) -> str:
        return f"{_PREFIX[self._form]}_{step:07d}"

    # --- continuing ---------------------------------------------------------------------------

    def newest_good(self, warn: Callable[[str], None]) -> Found | None:
        """The newest checkpoint whose manifest holds; None where there is none at all. Broken ones
        are named to `warn` and renamed, and `latest` names this one. CheckpointError if all are
        broken, or if one cannot be read: whether it is broken is not known."""
        candidates = self.steps()
        for step, directory in reversed(candidates.items()):
            problems = _faults(directory)
            if not problems:
                if pointed_at(self.folder) != directory:  # a kill came first, or newer ones broke
                    self._point(directory)
                return Found(directory=directory, step=step, has_run_state=True)
            renamed = set_aside(directory, "broken")
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            warn(
                f"checkpoint {directory.name} is broken: {problems[0]}{more}; kept as "
                f"{renamed.name}, trying the one before"
            )
        if candidates:
            self.refuse_broken()
        return None

    def refuse_unusable(self, *, begun: bool, resume: str) -> None:
        """CheckpointError where a first start would pass over what is here. `begun`: RUN has a
        record already."""
        if begun or resume == "auto":
            self.refuse_broken()  # an earlier start has renamed them: that is no new run
        if not begun and resume == "auto":
            self.refuse_others()  # whoever put it there wants to continue from it

    def refuse_others(self) -> None:
        """CheckpointError if there are checkpoints by others where a new run would begin."""
        if others := self.others():
            raise CheckpointError(
                f"{others[-1]}: found a checkpoint that no run has written (without "
                f"{manifest.NAME}), expected none in {self.folder}; move it away and give it by "
                "checkpoint.resume, or begin without it by --fresh"
            )

    def refuse_broken(self) -> None:
        """CheckpointError if there are checkpoints and all are broken."""
        broken = self._broken()
        if broken and not self.steps():
            raise CheckpointError(
                f"{self.folder}: found {len(broken)} checkpoints, all broken, expected a whole "
                "one; --fresh sets them aside and begins a new run"
            )

    def abandon_after(self, step: int) -> None:
        """Go back to `step`: keep newer checkpoints, but do not continue from them."""
        # `recover` would bring the replaced ones back.
        for directory in (*self.steps().values(), *self._replaced()):
            if step_of(directory) > step:
                set_aside(directory, "abandoned")

    def retire(self) -> Path | None:
        """Rename the folder if it has checkpoints of an earlier run, broken ones too; returns its
        new path."""
        there = self.steps() or self._broken()
        return set_aside(self.folder, _RETIRED) if there else None

    def where(self, path: Path) -> Path:
        """What `path` has become. What was in this folder has moved along with it since `retire`:
        a run that goes back to one of its own checkpoints is started by a path that it moves."""
        real, folder = (Path(os.path.realpath(one)) for one in (path, self.folder))
        if _checkpoint_in(path) is not None or not real.is_relative_to(folder):
            return path
        retired = re.compile(rf"{re.escape(folder.name)}\.{_RETIRED}-(\d+)")
        with _readable(folder.parent):
            found = [retired.fullmatch(there.name) for there in paths_in(folder.parent)]
        names = sorted((match for match in found if match), key=lambda match: -int(match[1]))
        moved = (folder.with_name(match[0]) / real.relative_to(folder) for match in names)
        return next((there for there in moved if _checkpoint_in(there) is not None), path)


def step_of(directory: Path) -> int:
    """The train step after which a checkpoint was written, by its name."""
    return int(directory.stem.partition("_")[2])


def _is_ours(directory: Path) -> bool:
    """Whether a run has written it: a manifest comes before the name, and either may be broken."""
    with _readable(directory):
        return (directory / manifest.NAME).exists() or (directory / RUN_STATE).exists()


def _faults(directory: Path, *, drop_cache: bool = False) -> list[str]:
    """The same as `manifest.faults`; CheckpointError for a file that cannot be read."""
    with _readable(directory):
        return manifest.faults(directory, drop_cache=drop_cache)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """CheckpointError in place of an OSError: it says nothing about what is there."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: found {error.strerror}, expected a checkpoint whose files "
            "can be read; nothing has been renamed or removed: mend the file system or the "
            "permissions, then start the same command"
        ) from error


def _begin_removal(directory: Path) -> None:
    """Make a checkpoint one that is to be removed, in one rename; where others have put files into
    it, remove all but those, which stay in NAME.removed-N."""
    try:
        own = manifest.read_manifest(directory)
    except ValueError:
        own = {}  # broken: whose its files are is not known
    if own.keys() >= set(manifest.files_in(directory)):
        directory.rename(directory.with_name(f"{_REMOVING}{directory.name}"))
        return
    for name in own:
        (directory / name).unlink(missing_ok=True)
    left = set_aside(directory, "removed")
    if own:  # last: a kill before this leaves a checkpoint, which the next retention removes
        (left / manifest.NAME).unlink(missing_ok=True)


def store_of(config: RunConfig) -> CheckpointStore:
    """The checkpoints in output_dir."""
    section = config.checkpoint
    return CheckpointStore(
        RunDirectory.of(config.output_dir).checkpoints,
        form=section.format,
        keep_last=section.keep_last,
        keep_best=section.keep_best,
    )


def at(path: Path) -> Found:
    """The checkpoint at `path`, or the newest one in that folder, whoever made it.

    CheckpointError says what is not there or does not hold.
    """
    found = named_at(path)
    if (found.directory / manifest.NAME).is_file() and (problems := _faults(found.directory)):
        raise CheckpointError(f"{problems[0]}; choose another checkpoint for checkpoint.resume")
    return found


def named_at(path: Path) -> Found:
    """The same by names alone: none of its files is read through."""
    directory = _checkpoint_in(path)
    if directory is None:
        raise CheckpointError(
            f"{path}: found no checkpoint, expected a directory with metadata.json, or a folder "
            f"with `{LATEST}` or {MEGATRON_TRACKER}; correct checkpoint.resume"
        )
    return Found(
        directory=directory,
        step=_step_in(directory),
        has_run_state=(directory / RUN_STATE).is_file(),
    )


def _checkpoint_in(path: Path) -> Path | None:
    """The checkpoint that is `path`, or that this folder points at; None where there is none."""
    there = path if (path / "metadata.json").is_file() else pointed_at(path)
    return there if there is not None and (there / "metadata.json").is_file() else None


def state_in(checkpoint: Path) -> dict[str, Any]:
    """run_state.json of a checkpoint; empty where there is none that can be understood, as of a
    checkpoint by Megatron-LM."""
    try:
        state = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _step_in(directory: Path) -> int:
    """The train step by run_state.json, as a copy may have any name; else by the name, or 0."""
    try:
        return int(state_in(directory)["step"])
    except (ValueError, KeyError, TypeError):
        return step_of(directory) if _NAME.fullmatch(directory.name) else 0


def pointed_at(folder: Path, *pointers: str) -> Path | None:
    """The checkpoint that the first pointer in `folder` names; None without one. `pointers`: names
    of their files, by default `latest`, then Megatron-LM's."""
    for pointer in pointers or (LATEST, MEGATRON_TRACKER):
        file = folder / pointer
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            return folder / (f"iter_{text.lstrip('0'):0>7}" if text.isdecimal() else text)
    return None
