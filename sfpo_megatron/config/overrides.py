"""`a.b.c=value` of the command line, set in the plain tree; the last of several on a key counts."""

from __future__ import annotations

from typing import Any

from sfpo_megatron.config.origin import COMMAND_LINE, ConfigError, Source
from sfpo_megatron.config.yaml_text import read_yaml


def apply_override(tree: dict[str, Any], override: str, source: Source) -> None:
    """Set one key; its value is read as YAML, as in a file. Raises ConfigError."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(
            COMMAND_LINE,
            override,
            found="no dotted key with a value",
            expected="key=value",
            fix="write it like train.num_steps=10",
        )
    source.forget(key)
    source.overridden.add(key)
    value = read_yaml(text, key, source)
    if text.lstrip().startswith("#"):
        source.comments.add(key)
    parent: Any = tree
    *path, last = key.split(".")
    for depth, name in enumerate(path):
        step: str | int = _index(parent, name, key) if isinstance(parent, list) else name
        if isinstance(parent, dict) and parent.get(name) is None:
            parent[name] = {}
            source.overridden.add(".".join(path[: depth + 1]))
        parent = parent[step]
        if not isinstance(parent, dict | list):
            raise ConfigError(
                COMMAND_LINE,
                key,
                found=f"{'.'.join(path[: depth + 1])} = {parent!r}",
                expected="a section or a list there",
                fix="drop what follows it in the key",
            )
    parent[_index(parent, last, key) if isinstance(parent, list) else last] = value


def _index(items: list[Any], name: str, key: str) -> int:
    if not (name.isascii() and name.isdigit()) or int(name[:9]) >= len(items):
        raise ConfigError(
            COMMAND_LINE,
            key,
            found=f"index {name!r} into a list of {len(items)}",
            expected=f"an index from 0 to {len(items) - 1}" if items else "a list with entries",
            fix="use an index that is there, or override the whole list",
        )
    return int(name)
