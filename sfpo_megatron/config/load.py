"""YAML file + dotted overrides -> RunConfig, strictly: what does not fit is refused by name.

Relative paths in a config (model.path, data.*.path, output_dir...) are relative to the current
directory, not to the config file; `~` and variables in them are expanded here (paths.py), once. No
torch is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.paths import PathError, escape, expand, is_path
from sfpo_megatron.config.tree import RunConfig

COMMAND_LINE = "command line"
# YAML 1.1 reads `1e-6` (no dot) as a string; a float field takes it for what it means.
_FLOAT_TEXT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


class ConfigError(ValueError):
    """One value of a config is wrong: where, what was found, what was expected, what to do."""

    def __init__(
        self, file: str, key: str, *, found: str, expected: str, fix: str, line: int | None = None
    ) -> None:
        self.file, self.key, self.found, self.expected, self.fix = file, key, found, expected, fix
        at = f" (line {line})" if line else ""
        super().__init__(f"{file}: {key}: found {found}, expected {expected}; {fix}{at}")


@dataclass(kw_only=True, slots=True)
class _Source:
    """The origin of each key of the plain tree, so that an error can say it."""

    file: str
    lines: dict[str, int]
    overridden: set[str]

    def error(self, key: str, *, found: str, expected: str, fix: str) -> ConfigError:
        parts = key.split(".")
        above = {".".join(parts[: n + 1]) for n in range(len(parts))}
        from_cli = bool(above & self.overridden)
        return ConfigError(
            COMMAND_LINE if from_cli else self.file,
            key or "(top level)",
            found=found,
            expected=expected,
            fix=fix,
            line=None if from_cli else self.lines.get(key),
        )


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read `path` (None: overrides alone), apply `a.b.c=value` overrides, and build the config;
    raises ConfigError."""
    file = COMMAND_LINE if path is None else str(path)
    source = _Source(file=file, lines={}, overridden=set())
    tree = {} if path is None else _read_yaml(Path(path), source)
    for override in overrides or []:
        _apply_override(tree, override, source)
    config = _build(RunConfig, tree, "", source)
    assert isinstance(config, RunConfig)
    return config


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` turns back into an equal config."""
    # ASCII with escapes: written as they are, characters such as U+0085 do not survive PyYAML.
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=False, width=96)


def _plain(value: Any, key: str = "") -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), _join(key, name)) for name in names}
    if isinstance(value, tuple | list):
        return [_plain(item, _join(key, str(index))) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: _plain(item, _join(key, str(name))) for name, item in value.items()}
    return escape(value) if isinstance(value, str) and is_path(key) else value


# ---- YAML -> plain tree ------------------------------------------------------------------------


def _read_yaml(path: Path, source: _Source) -> dict[str, Any]:
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        raise ConfigError(
            str(path), "(file)", found=found, expected="a YAML file", fix="correct the path"
        )
    try:
        text = path.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            tree = _from_node(node, "", loader, source, ()) if node is not None else {}
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(
            str(path), "(file)", found=problem, expected="valid YAML", fix="correct that line"
        ) from error
    if not isinstance(tree, dict):
        raise source.error(
            "",
            found=_name(tree),
            expected="a mapping of sections",
            fix="start from a config in examples/",
        )
    return tree


def _from_node(
    node: yaml.Node, key: str, loader: yaml.SafeLoader, source: _Source, above: tuple[int, ...]
) -> Any:
    """A YAML node as plain Python; duplicate keys (YAML keeps the last, silently) are refused."""
    source.lines[key] = node.start_mark.line + 1
    if id(node) in above:
        raise source.error(
            key, found="an alias to itself", expected="a finite value", fix="remove the alias"
        )
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [
            _from_node(item, _join(key, str(index)), loader, source, above)
            for index, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            child = _join(key, name)
            if name in result:
                first = source.lines[child]
                source.lines[child] = key_node.start_mark.line + 1
                raise source.error(
                    child,
                    found=f"the key twice (first on line {first})",
                    expected="each key once",
                    fix="remove one of the two",
                )
            result[name] = _from_node(value_node, child, loader, source, above)
            source.lines[child] = key_node.start_mark.line + 1
        return result
    return loader.construct_object(node, deep=True)


# ---- overrides ---------------------------------------------------------------------------------


def _apply_override(tree: dict[str, Any], override: str, source: _Source) -> None:
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
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            COMMAND_LINE,
            key,
            found=repr(text),
            expected="a YAML value",
            fix="quote it for the shell and for YAML",
        ) from error
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
    source.overridden.add(key)


def _index(items: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(
            COMMAND_LINE,
            key,
            found=f"index {name!r} into a list of {len(items)}",
            expected=f"an index from 0 to {len(items) - 1}" if items else "a list with entries",
            fix="use an index that is there, or override the whole list",
        )
    return int(name)


# ---- plain tree -> dataclasses -----------------------------------------------------------------


def _build(cls: type, tree: Any, key: str, source: _Source) -> Any:
    if not isinstance(tree, dict):
        raise source.error(
            key,
            found=_name(tree),
            expected="a section",
            fix=f"give it keys, or remove it for the defaults of {key or 'the run'}",
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            raise source.error(
                _join(key, name),
                found="an unknown key",
                expected=f"one of {', '.join(fields)}",
                fix=_did_you_mean(name, fields),
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        child = _join(key, name)
        if name in tree:
            values[name] = _convert(tree[name], hints[name], child, source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise source.error(
                child, found="nothing", expected=_describe(hints[name]), fix=f"set {child}"
            )
    try:
        return cls(**values)
    except FieldError as error:
        raise source.error(
            _join(key, error.field_name),
            found=repr(error.found),
            expected=error.expected,
            fix=error.fix,
        ) from error


def _convert(value: Any, hint: Any, key: str, source: _Source) -> Any:
    """`value` as the field's annotation asks for it, or ConfigError."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key, source)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return _convert(value, inner, key, source)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        inner_hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner_hints) == len(value):
            return tuple(
                _convert(item, inner, _join(key, str(index)), source)
                for index, (item, inner) in enumerate(zip(value, inner_hints, strict=True))
            )
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float:
        if isinstance(value, str) and _FLOAT_TEXT.fullmatch(value):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str) and is_path(key):
        return _expanded(value, key, source)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise source.error(
        key, found=_name(value), expected=_describe(hint), fix=_advice(value, hint, key)
    )


def _expanded(value: str, key: str, source: _Source) -> str:
    try:
        return expand(value)
    except PathError as error:
        raise source.error(
            key, found=error.found, expected=error.expected, fix=error.fix
        ) from error


def _advice(value: Any, hint: Any, key: str) -> str:
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        return _did_you_mean(value, typing.get_args(hint), "use one of these")
    if hint is str and value is not None:
        return f"write it in quotes: {key.rsplit('.', 1)[-1]}: '{value}'"
    if hint is bool:
        return "write true or false"
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        return "write a list: [...]"
    return f"correct the value of {key}"


def _did_you_mean(name: str, known: Any, otherwise: str = "remove it or correct its name") -> str:
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else otherwise


_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list, each entry {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(_describe(arg) for arg in args)
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section of keys"
    return _WORDS.get(hint, str(hint))


def _name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a section of keys"
    return f"{value!r}" if isinstance(value, bool | list) else f"{value!r} ({type(value).__name__})"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
