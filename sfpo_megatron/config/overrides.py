"""`a.b.c=value` of the command line, set in the plain tree; the last of several on a key counts."""

from __future__ import annotations

import math
from typing import Any

import yaml

from sfpo_megatron.config.origin import COMMAND_LINE, ConfigError, Source
from sfpo_megatron.config.yaml_text import read_yaml

_SAYS_HOW = ("'", '"', "|", ">", "!", "&", "*")
"""Text that begins so says itself how YAML is to read it."""


def override_of(key: str, value: Any) -> str:
    """`key=value` that sets the dotted `key` to the plain `value`, whatever is in it."""
    # In a list, so that nothing follows it; JSON's escapes are not YAML's beyond U+FFFF.
    listed = yaml.safe_dump([value], default_flow_style=True, width=math.inf)
    return f"{key}={listed.strip()[1:-1]}"


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
    _refuse_what_is_cut(key, text.strip(), value)
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


def _refuse_what_is_cut(key: str, text: str, value: Any) -> None:
    """`output_dir=runs #3` is `runs` to YAML, and line breaks are spaces: it was a shell that wrote
    the text, not somebody who wanted a comment."""
    if isinstance(value, str) and value != text and text[:1] not in _SAYS_HOW:
        raise ConfigError(
            COMMAND_LINE,
            key,
            found=f"{value!r}, which YAML makes of {text!r}",
            expected="the whole text",
            fix="put it in double quotes inside single quotes, for the shell and for YAML",
        )


def _index(items: list[Any], name: str, key: str) -> int:
    if not (name.isascii() and name.isdigit()) or int(name[:9]) >= len(items):
        raise ConfigError(
            COMMAND_LINE,
            key,
            found=f"index {name!r} into a list of {len(items)}",
            expected=f"an index from 0 to {len(items) - 1}" if items else "a list with entries",
            fix="use an index that is there, such as 0, or override the whole list",
        )
    return int(name)
