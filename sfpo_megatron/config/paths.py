"""Keys of a config that are paths: what `~` and `$VARIABLE` stand for in them, and back.

`load_config` expands them once and `dump_config` escapes what `expand` would read, so that nobody
else looks at a home directory or a variable. An expanded path stays relative if it was written so;
`with_absolute_paths` is for a process that runs in another directory. Standard library only.
"""

from __future__ import annotations

import os
import pwd
import re
import unicodedata
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sfpo_megatron.config.rollout import RolloutConfig
from sfpo_megatron.config.tree import DataSource, RunConfig
from sfpo_megatron.errors import InputError

PATH_KEYS = frozenset(
    {
        "output_dir",
        "model.path",
        "data.train.*.path",
        "data.eval.*.path",
        "debug.save_rollouts",
        "debug.train_only",
        "checkpoint.resume",
        "rollout.environment_args.tool_args.search.path",
    }
)
"""Every key that is a path; `*` for the index into a list."""
NOT_DIRECTORIES = ("auto", "never")
"""Values of checkpoint.resume that name no directory."""

_NAME_BYTES, _PATH_BYTES = 255, 3500  # Linux's limits; a run's own names follow
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})?", re.A)
_NAME = re.compile(r"[A-Za-z_]\w*", re.A)
_HUB_ID = re.compile(r"(?:\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.A)
_INDEX = re.compile(r"\.\d+(?=\.|$)")


class PathError(InputError):
    """A path cannot be used; the caller knows the key or the option."""

    def __init__(self, *, found: str, expected: str, fix: str) -> None:
        super().__init__("", found, expected, fix)


def is_path(key: str) -> bool:
    """Whether the value of the dotted `key` is a path."""
    return _INDEX.sub(".*", key) in PATH_KEYS


# ---- expand and escape -------------------------------------------------------------------------


def expand(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced and `$$` as a dollar.

    As in a shell, `~` counts at the beginning only and a variable's value is taken as it is. The
    result never begins with `~`: a file of that name is given as `./~name`. Raises PathError.
    """
    home, rest = "", text
    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        rest = slash + rest
        home = _home(user, environ)
        home = home.rstrip("/") if rest else home
    path = home + _VARIABLE.sub(lambda match: _value(match, text, environ), rest)
    if not path.strip():
        raise PathError(found=repr(path), expected="a path", fix="name one")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path):
        raise PathError(
            found=repr(path),
            expected="a path without control characters, line breaks and lone surrogates",
            fix="rename it",
        )
    longest = max(map(len, path.encode().split(b"/")))
    if longest > _NAME_BYTES or len(path.encode()) > _PATH_BYTES:
        raise PathError(
            found=f"{path[:40]!r}... of {len(path.encode())} bytes, with a name of {longest}",
            expected=f"at most {_PATH_BYTES} bytes, and {_NAME_BYTES} in a name",
            fix="choose a shorter one",
        )
    return f"./{path}" if path.startswith("~") else path


def from_option(text: str) -> str:
    """A path of a command line, where a shell leaves the `~` of `--out=~/x` to the command; `$` is
    the shell's own. Raises ArgumentTypeError, so that it can be the `type` of an option."""
    try:
        return expand(text.replace("$", "$$"))
    except PathError as error:
        raise ArgumentTypeError(str(error)) from error


def path_from_option(text: str) -> Path:
    """`from_option` as a Path."""
    return Path(from_option(text))


def escape(path: str) -> str:
    """The text that `expand` turns into `path` again, or into `./path` where it begins with `~`."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def _home(user: str, environ: Mapping[str, str]) -> str:
    """What `~` or `~name` stands for."""
    if user == "~" and "HOME" in environ:
        if not environ["HOME"]:
            raise _unusable("'~', and the variable HOME is empty", "set HOME")
        return environ["HOME"]
    try:
        entry = pwd.getpwuid(os.getuid()) if user == "~" else pwd.getpwnam(user[1:])
    except KeyError:
        if user == "~":
            raise _unusable(
                f"'~', the variable HOME is not set, and user id {os.getuid()} has no entry in the "
                "passwd file",
                "set HOME",
            ) from None
        raise _unusable(
            f"{user!r}, and no such user", "correct the name, or write ./~ for a file of that name"
        ) from None
    return entry.pw_dir


def _value(match: re.Match[str], text: str, environ: Mapping[str, str]) -> str:
    if match["dollar"]:
        return "$"
    name = match["bare"] or match["braced"] or ""
    if not _NAME.fullmatch(name):
        raise _unusable(f"{text!r}, where {match[0]!r} names no variable", "write $$ for a dollar")
    if not environ.get(name):
        what = "is empty" if name in environ else "is not set"
        raise _unusable(
            f"{text!r}, and the variable {name} {what}", f"set {name}, or write $$ for a dollar"
        )
    return environ[name]


def _unusable(found: str, fix: str) -> PathError:
    return PathError(
        found=found, expected="a path, with ~ or variables that stand for one", fix=fix
    )


# ---- elsewhere ---------------------------------------------------------------------------------


def looks_like_path(value: str) -> bool:
    """Whether model.path is a directory: a hub id is `owner/name` (or `name`) in the hub's letters,
    and nothing of it exists here."""
    if not _HUB_ID.fullmatch(value) or ".." in value or "--" in value:
        return True
    return os.path.lexists(value.partition("/")[0])


def absolute_model(path: str) -> str:
    """`model.path` for a process in another directory; a hub id stays."""
    return _absolute(path) if looks_like_path(path) else path


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """`config` for a process that runs in another directory: each of `PATH_KEYS` is absolute."""
    data, debug, checkpoint = config.data, config.debug, config.checkpoint
    if checkpoint.resume not in NOT_DIRECTORIES:
        checkpoint = replace(checkpoint, resume=_absolute(checkpoint.resume))
    return replace(
        config,
        output_dir=_absolute(config.output_dir),
        model=replace(config.model, path=absolute_model(config.model.path)),
        data=replace(
            data,
            train=tuple(_absolute_source(source) for source in data.train),
            eval=tuple(_absolute_source(source) for source in data.eval),
        ),
        debug=replace(
            debug,
            save_rollouts=_absolute_or_none(debug.save_rollouts),
            train_only=_absolute_or_none(debug.train_only),
        ),
        rollout=_with_absolute_search(config.rollout),
        checkpoint=checkpoint,
    )


def _with_absolute_search(rollout: RolloutConfig) -> RolloutConfig:
    """The file that the tool `search` searches."""
    given = rollout.environment_args
    match given:
        case {"tool_args": {"search": {"path": str(path), **search}, **others}}:
            tools = {**others, "search": {**search, "path": _absolute(path)}}
            return replace(rollout, environment_args={**given, "tool_args": tools})
    return rollout


def _absolute_source(source: DataSource) -> DataSource:
    if source.source == "hf" and source.path is not None:  # a name on the hub stays
        return replace(source, path=absolute_model(source.path))
    return replace(source, path=_absolute_or_none(source.path))


def _absolute_or_none(path: str | None) -> str | None:
    return None if path is None else _absolute(path)


def _absolute(path: str) -> str:
    # Not normalized: LINK/.. is not where LINK is.
    return os.path.join(os.getcwd(), path)
