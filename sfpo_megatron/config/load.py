"""YAML file + dotted overrides -> RunConfig, strictly: what does not fit is refused by name.

Relative paths in a config (model.path, data.*.path, output_dir...) are relative to the current
directory, not to the config file; `~` and variables in them are expanded here (paths.py), once. No
torch is imported.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from sfpo_megatron.config.origin import COMMAND_LINE, ConfigError, Source, join
from sfpo_megatron.config.overrides import apply_override
from sfpo_megatron.config.paths import escape, is_path
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.config.typed import NUMBER_TEXT, build
from sfpo_megatron.config.yaml_text import read_yaml
from sfpo_megatron.errors import LATER, may_pass

__all__ = ["ConfigError", "dump_config", "is_dumped", "load_config"]


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read `path` (None: overrides alone), apply `a.b.c=value` overrides, and build the config;
    raises ConfigError."""
    source = Source(file=COMMAND_LINE if path is None else str(path))
    tree = None if path is None else read_yaml(_text(Path(path)), "", source)
    if tree is None:
        tree, source.lines[""] = {}, 1
    if isinstance(tree, dict):  # else `build` says what it is
        for override in overrides or []:
            apply_override(tree, override, source)
    config = build(RunConfig, tree, "", source)
    assert isinstance(config, RunConfig)
    return config


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no regular file"
            raise _unreadable(path, what if path.exists() else "no such file", "correct the path")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        fix = LATER if may_pass(error) else "correct the path or its permissions"
        raise _unreadable(path, reason, fix) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ConfigError(
            str(path),
            "(file)",
            found="UTF-16" if wide else f"the byte 0x{content[error.start]:02x}",
            expected="UTF-8 text",
            fix="save it as UTF-8",
            line=line,
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unreadable(path: Path, found: str, fix: str) -> ConfigError:
    return ConfigError(str(path), "(file)", found=found, expected="a YAML file", fix=fix)


_ALWAYS = ("seed", "output_dir", "model", "megatron", "objective", "tracking", "debug")
"""Sections of every config with its defaults filled in."""


class _Dumper(yaml.SafeDumper):
    """Puts texts that `load_config` would take for numbers in quotes."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{NUMBER_TEXT.pattern})$"), list("-+0123456789.")
)


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` turns back into an equal config."""
    # ASCII with escapes: written as they are, characters such as U+0085 do not survive PyYAML.
    return _dumped(_plain(config))


def is_dumped(file: Path) -> bool:
    """Whether `dump_config` of this or another version may have written `file`: nobody's comments,
    layout or choice of keys are lost with it."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not text:
        return True  # nothing to lose
    return isinstance(tree, dict) and {*_ALWAYS} <= {*tree} and _dumped(tree) == text


def _dumped(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=96)


def _plain(value: Any, key: str = "") -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), join(key, name)) for name in names}
    if isinstance(value, tuple | list):
        return [_plain(item, join(key, str(index))) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: _plain(item, join(key, str(name))) for name, item in value.items()}
    return escape(value) if isinstance(value, str) and is_path(key) else value
