"""Keys that are paths: `~` and variables expanded at load, escaped in a dump, made absolute."""

from __future__ import annotations

import dataclasses
import os
import pwd
import re
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from sfpo_megatron.config import reference
from sfpo_megatron.config.load import ConfigError, dump_config, load_config
from sfpo_megatron.config.paths import (
    PATH_KEYS,
    PathError,
    escape,
    expand,
    is_path,
    with_absolute_paths,
)
from sfpo_megatron.config.tree import RunConfig

BASE = """\
output_dir: runs/test
model: {path: some/model}
data:
  train:
    - {source: reasoning_gym, task: chain_sum, size: 100}
    - {source: jsonl, path: rows.jsonl}
  eval:
    - {source: jsonl, path: held_out.jsonl}
debug: {save_rollouts: saved}
checkpoint: {resume: a/checkpoint}
"""
OVERRIDE = {  # path key -> the key in BASE
    "output_dir": "output_dir",
    "model.path": "model.path",
    "data.train.*.path": "data.train.1.path",
    "data.eval.*.path": "data.eval.0.path",
    "debug.save_rollouts": "debug.save_rollouts",
    "debug.train_only": "debug.train_only",
    "checkpoint.resume": "checkpoint.resume",
    "rollout.environment_args.tool_args.search.path": (
        "rollout.environment_args.tool_args.search.path"
    ),
}
ENVIRON = {"HOME": "/home/me", "A": "/a b", "B_2": "ü", "TILDE": "~", "DOLLAR": "$A", "EMPTY": ""}


def load(folder: Path, *overrides: str, text: str = BASE) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, list(overrides))


def value_at(config: RunConfig, key: str) -> str:
    value: typing.Any = config
    for part in key.split("."):
        if part.isdigit():
            value = value[int(part)]
        else:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert isinstance(value, str)
    return value


# ---- expand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/x", "runs/x"), (".", "."), ("a b/ü/", "a b/ü/"), (" a", " a"), ("~", "/home/me"),
        ("~/x y", "/home/me/x y"), ("a~b/~", "a~b/~"), ("$A/x", "/a b/x"), ("${A}x", "/a bx"),
        ("$A$B_2", "/a bü"), ("$B_2é", "üé"), ("x$$A", "x$A"), ("$$$A", "$/a b"), ("$$", "$"),
        ("$TILDE/x", "./~/x"), ("$DOLLAR", "$A"), ("./~x", "./~x"), ("~/$A", "/home/me//a b"),
    ],
)  # fmt: skip
def test_expansion(text: str, expected: str) -> None:
    """A value that a variable brings in is not expanded again."""
    assert expand(text, ENVIRON) == expected


@pytest.mark.parametrize("text", ["~/x", "~", "$A/x", "${A}/$B_2", "~/a b/$B_2", "a/b"])
def test_expansion_is_the_shells(text: str, tmp_path: Path) -> None:
    """Independent reference: sh, with each variable in quotes so that it is one word."""
    word = re.sub(r"(\$\w+|\$\{\w+\})", r'"\1"', text.replace(" ", "\\ "))
    command = ["sh", "-c", f"printf %s {word}"]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, check=True, cwd=tmp_path)
    assert expand(text, ENVIRON) == done.stdout.decode()


def test_home_of_a_user() -> None:
    me = pwd.getpwuid(os.getuid())
    assert expand(f"~{me.pw_name}/x", ENVIRON) == f"{me.pw_dir.rstrip('/')}/x"
    assert expand("~/x", {}) == f"{me.pw_dir.rstrip('/')}/x", "without HOME"
    assert expand("~/x", {"HOME": "/"}) == "/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found '', expected a path; name one"),
        (" \t", r"found ' \t', expected a path; name one"),
        ("$UNSET/x", "the variable UNSET is not set, expected a path"),
        ("a/$EMPTY", "the variable EMPTY is empty"),
        ("${UNSET}", "set UNSET, or write $$ for a dollar"),
        ("a$", "'$' names no variable"),
        ("a$/b", "'$' names no variable"),
        ("$1", "'$' names no variable"),
        ("${A", "names no variable"),
        ("${A-x}", "'${A-x}' names no variable"),
        ("~no-such-user-here/x", "found '~no-such-user-here', and no such user"),
        ("a\nb", r"found 'a\nb', expected a path without control characters"),
        ("a\x00", "without control characters"),
        ("a\x85", "without control characters"),
        ("a\udc80", "lone surrogates"),
    ],
)
def test_what_cannot_be_a_path(text: str, message: str) -> None:
    with pytest.raises(PathError) as caught:
        expand(text, ENVIRON)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_home_is_an_error() -> None:
    with pytest.raises(PathError, match="HOME is empty"):
        expand("~/x", {"HOME": ""})


PATHS = st.text(st.sampled_from("$~/.{}aA_ ü\"'#:\\") | st.characters(), max_size=12)


@settings(max_examples=300)
@example("~")
@example("$$~/${A}")
@given(PATHS)
def test_a_literal_path_survives_its_escape(path: str) -> None:
    """What `expand` gives for `escape(path)` is the file `path`: the same text, but for the `./` of
    a name that begins with `~`."""
    try:
        found = expand(escape(path), {})
    except PathError:
        assert not path.strip() or any(not c.isprintable() for c in path)
        return
    assert found == (f"./{path}" if path.startswith("~") else path)
    assert expand(escape(found), {}) == found


# ---- load and dump -----------------------------------------------------------------------------


def test_every_path_key_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/$NO/me")
    monkeypatch.setenv("DATA", "~data$X")
    assert OVERRIDE.keys() == PATH_KEYS
    for key in OVERRIDE.values():
        assert value_at(load(tmp_path, f"{key}=~/x y"), key) == "/home/$NO/me/x y"
        config = load(tmp_path, f"{key}='$DATA/é$$'")
        assert value_at(config, key) == "./~data$X/é$"
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config


def test_other_text_is_left_alone(tmp_path: Path) -> None:
    config = load(tmp_path, "data.prompt_suffix='~ $UNSET $$'", "rollout.engine_args={a: $B}")
    assert config.data.prompt_suffix == "~ $UNSET $$"
    assert config.rollout.engine_args == {"a": "$B"}
    assert load(tmp_path, "checkpoint.resume=auto").checkpoint.resume == "auto"


def test_an_error_names_key_and_line(tmp_path: Path) -> None:
    text = BASE.replace("rows.jsonl", "$UNSET_HERE/rows.jsonl")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text=text)
    assert str(caught.value) == (
        f"{tmp_path / 'run.yaml'}: data.train.1.path: found '$UNSET_HERE/rows.jsonl', and the "
        "variable UNSET_HERE is not set, expected a path, with ~ or variables that stand for one; "
        "set UNSET_HERE, or write $$ for a dollar (line 6)"
    )
    for blank in ("''", "'  '"):
        with pytest.raises(
            ConfigError, match=r"^command line: output_dir: found '.*expected a path"
        ):
            load(tmp_path, f"output_dir={blank}")


@settings(deadline=None, max_examples=100)
@example(text="${A}$$~/ü ", override="~/x")
@given(
    text=st.lists(
        st.sampled_from(
            ["${A}", "${B_2}", "$$", "~", "/", ".", "..", " ", "ü", "x", "'", '"', "#", ":"]
        )
    ).map("".join),
    override=st.sampled_from(["runs/x", "~/x", "$TILDE", "./$$", "~"]),
)
def test_a_dump_loads_to_an_equal_config(
    text: str, override: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        file = folder / "run.yaml"
        file.write_text(BASE)
        config = load_config(file)
        try:
            config = dataclasses.replace(config, output_dir=expand(override))
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, path=expand(text))
            )
        except PathError:
            reject()
        file.write_text(dump_config(config), encoding="utf-8")
        patch.setenv("A", "another")
        assert load_config(file) == config


# ---- which keys --------------------------------------------------------------------------------

NOT_PATHS: dict[str, str] = {}
"""Keys of text whose name or meaning speaks of files, and why they are no paths."""


def text_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, meaning) of every field that may be a text."""
    hints = typing.get_type_hints(cls)
    meanings = reference._field_docstrings()[cls.__name__]
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        entries = [hint, *typing.get_args(hint)]
        for entry in entries:
            if dataclasses.is_dataclass(entry):
                below = key if entry is hint else f"{key}.*"
                yield from text_keys(typing.cast(type, entry), f"{below}.")
        if str in entries:
            yield key, meanings.get(field.name, "")


def test_a_key_that_looks_like_a_path_is_one() -> None:
    """By its name, or by a docstring that speaks of a file or a directory. A new key goes into
    `PATH_KEYS`, or with a reason into `NOT_PATHS`."""
    keys = dict(text_keys())
    within = {key for key in PATH_KEYS if key.startswith("rollout.environment_args.")}
    assert keys.keys() >= PATH_KEYS - within  # what an environment's settings are is its own
    suspicious = {
        key
        for key, meaning in keys.items()
        if re.search(r"(^|[._])(path|dir|directory|file|folder)s?$", key)
        or re.search(r"\b(file|directory|folder|path)s?\b", meaning)
    }
    assert suspicious - NOT_PATHS.keys() <= PATH_KEYS
    assert {"output_dir", "model.path", "debug.train_only", "checkpoint.resume"} <= suspicious
    assert is_path("data.train.12.path") and not is_path("data.train.path")


# ---- elsewhere ---------------------------------------------------------------------------------


def test_absolute_paths_for_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    search = OVERRIDE["rollout.environment_args.tool_args.search.path"]
    config = load(tmp_path, "debug.train_only=t", "model.path=a/b/../c", f"{search}=wiki.txt")
    there = with_absolute_paths(config)
    for key in OVERRIDE.values():
        assert value_at(there, key) == f"{tmp_path}/{value_at(config, key)}"
    assert with_absolute_paths(there) == there
    assert value_at(config, "output_dir") == "runs/test", "what is printed stays as it was written"


def test_what_is_no_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id, unless it is a directory here; auto and never; null."""
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path, "model.path=owner/name", "checkpoint.resume=never")
    there = with_absolute_paths(config)
    assert (there.model.path, there.checkpoint.resume) == ("owner/name", "never")
    assert there.debug.train_only is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert with_absolute_paths(config).model.path == f"{tmp_path}/owner/name"
