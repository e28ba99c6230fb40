"""Plain tree -> dataclasses: each value as its field's annotation asks for it, or ConfigError."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from sfpo_megatron.config.fields import FieldError, nearest
from sfpo_megatron.config.names import did_you_mean
from sfpo_megatron.config.origin import Source, join
from sfpo_megatron.config.paths import PathError, expand, is_path
from sfpo_megatron.config.yaml_text import shorten

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")
# YAML 1.1 reads `1e-6` (no dot) as a string; a float field takes it for what it means.
NUMBER_TEXT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.A)
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_MAX_INT, _MAX_FLOAT = 2**63 - 1, 3.4e38  # what torch and vLLM hold
_FEW_TEXTS = {"checkpoint.resume": "write auto, never or a directory"}
"""What to write for a text that has few values, where YAML made something else of it."""
_MAIN_KEY = {"model": "path", "parallel": "data", "reward": "function", "objective.kl": "coef"}
"""Section -> the key that is meant where a value stands in its place."""
_OF_SOURCES = ("data.train", "data.eval")
_KIND_OF = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
"""A suffix in a file's name -> the kind of source that reads it."""


def build(cls: type[Section], tree: Any, key: str, source: Source) -> Section:
    """The section `cls` at `key`."""
    if not isinstance(tree, dict):
        raise source.error(
            key,
            found=_made_of(tree, key, source),
            expected="a section" if key else "a mapping of sections",
            fix=_as_keys(tree, key),
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            child = join(key, name)
            fix = did_you_mean(child, fields, tree[name], otherwise="remove it or correct its name")
            expected = f"one of {', '.join(fields)}"
            raise source.error(child, found="an unknown key", expected=expected, fix=fix)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        child = join(key, name)
        if name in tree:
            values[name] = _convert(tree[name], hints[name], child, source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise source.error(
                child, found="nothing", expected=_describe(hints[name]), fix=f"set {child}"
            )
    make: Callable[..., Section] = cls  # no type has said what its fields are
    try:
        return make(**values)
    except FieldError as error:
        raise source.error(
            join(key, error.where),
            found=error.found,
            expected=error.expected,
            fix=error.fix,
        ) from error


def _convert(value: Any, hint: Any, key: str, source: Source, whole: Any = None) -> Any:
    """`value` as the field's annotation asks for it. `whole`: the annotation with its null."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key, source)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        first, *others = (arg for arg in args if arg is not type(None))
        lists = (arg for arg in others if typing.get_origin(arg) is tuple)
        inner = next(lists, first) if isinstance(value, list) else first
        return _convert(value, inner, key, source, hint)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        inner_hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner_hints) == len(value):
            return tuple(
                _convert(item, inner, join(key, str(index)), source)
                for index, (item, inner) in enumerate(zip(value, inner_hints, strict=True))
            )
    if origin is dict and isinstance(value, dict):
        if args[1] is str:
            return {n: _convert(item, str, join(key, n), source) for n, item in value.items()}
        return _passed_on(value, key, source)
    if hint in (int, float):
        number = _number(value, hint, key, source)
        if number is not None:
            return number
    if hint is str and isinstance(value, str) and is_path(key):
        return _expanded(value, key, source)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise source.error(
        key,
        found=_made_of(value, key, source),
        expected=_describe(whole or hint),
        fix=_advice(value, hint, key, source),
    )


def _number(value: Any, hint: type, key: str, source: Source) -> int | float | None:
    """An int or a float as `hint` says; None if it is not one."""
    if hint is float and isinstance(value, str) and NUMBER_TEXT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    _check_digits(value, key, source)
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise source.error(
            key,
            found=f"{shorten(str(value))} (int)",
            expected="a number below 2**63",
            fix="write a smaller one",
        )
    if hint is int:
        return value if isinstance(value, int) else None
    if math.isfinite(value) and abs(value) > _MAX_FLOAT:
        raise source.error(
            key,
            found=f"{value:g}",
            expected=f"a number below {_MAX_FLOAT:g}, as float32 has them",
            fix="write a smaller one",
        )
    return float(value) if math.isfinite(value) else None


def _check_digits(value: int | float, key: str, source: Source) -> None:
    """Refuse numbers that mean another to whoever wrote them: 010 is 8 and 1:30 is 90."""
    text = source.texts.get(key, "")
    if ":" in text:
        how, fix = "minutes to base 60", f"write {value}"
    elif isinstance(value, int) and _OCTAL.fullmatch(text):
        how, fix = "octal", f"write {int(text)}, or {value} if octal was meant"
    else:
        return
    raise source.error(
        key,
        found=f"{value}, which YAML makes of {text} ({how})",
        expected="a plain decimal number",
        fix=f"{fix}; a text goes in quotes",
    )


def _passed_on(value: Any, key: str, source: Source) -> Any:
    """The values of a section whose keys are another's: only what YAML misreads is looked at."""
    if isinstance(value, dict):
        return {name: _passed_on(item, join(key, name), source) for name, item in value.items()}
    if isinstance(value, list):
        return [_passed_on(item, join(key, str(index)), source) for index, item in enumerate(value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_digits(value, key, source)
    elif isinstance(value, str):
        if is_path(key):
            return _expanded(value, key, source)
        without_quotes = key in source.texts
        if without_quotes and {*value} & {*".eE"} and NUMBER_TEXT.fullmatch(value):
            return float(value)  # YAML 1.1 makes a text of 1e-6
    elif value is not None and not isinstance(value, bool):
        raise source.error(
            key,
            found=_made_of(value, key, source),
            expected="a number, a text, true, false, null, a list or a section",
            fix=_in_quotes(value, key, source),
        )
    return value


def _expanded(value: str, key: str, source: Source) -> str:
    try:
        return expand(value)
    except PathError as error:
        raise source.error(
            key, found=error.found, expected=error.expected, fix=error.fix
        ) from error


# ---- words -------------------------------------------------------------------------------------


def _advice(value: Any, hint: Any, key: str, source: Source) -> str:
    if isinstance(value, str) and key in source.texts and _is_fused_key(value):
        return _with_space(value)
    if typing.get_origin(hint) is Literal:
        if isinstance(value, str):
            choices = [str(one) for one in typing.get_args(hint)]
            return nearest(value, choices, otherwise="use one of these")
        return "use one of these"
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        return _as_list(value, key)
    if key in source.comments:
        return "write the value before the #, which begins a comment, or the text in quotes"
    if hint is str:
        return _FEW_TEXTS.get(key) or _in_quotes(value, key, source)
    if hint is bool:
        quoted = isinstance(value, str) and key not in source.texts
        return "write true or false" + (", without quotes" if quoted else "")
    if hint in (int, float):
        return _as_number(value, hint) or f"correct the value of {key}"
    return f"correct the value of {key}"


def _in_quotes(value: Any, key: str, source: Source) -> str:
    if isinstance(value, dict):
        return "write a text that holds ': ' or brackets in quotes"
    if isinstance(value, list):
        return "write one text, without [] and dashes"
    name, text = key.rsplit(".", 1)[-1], source.texts.get(key, str(value))
    if value is None:
        return f"give {name} a value" + (
            ": ~ alone is null in YAML, ~/ is your home directory"
            if text == "~"
            else ", or remove it for its default"
        )
    if key in source.overridden:
        return f"write it in quotes, for the shell and for YAML: {key}=\"'{text}'\""
    return "write it in quotes: " + (f"'{text}'" if name.isdigit() else f"{name}: '{text}'")


def _as_number(value: Any, hint: type) -> str | None:
    """How to write what is meant by a text or by a float in an integer's place."""
    text = str(value).strip().replace(",", "").replace("_", "").removeprefix("+")
    if isinstance(value, bool | list | dict) or value is None or not NUMBER_TEXT.fullmatch(text):
        return None
    number = float(text)
    if hint is float and math.isfinite(number):
        return f"write {number!r}"
    return f"write {int(number)}" if hint is int and number.is_integer() else None


def _as_keys(value: Any, key: str) -> str:
    if isinstance(value, str) and _is_fused_key(value):
        return _with_space(value)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "remove the dashes: a section is keys, not a list"
    if not key:
        return "start from a config in examples/"
    if isinstance(value, str) and key.rpartition(".")[0] in _OF_SOURCES:
        return f"write {_as_source(value)}"
    if key in _MAIN_KEY and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"write {{{_MAIN_KEY[key]}: {value}}}"
    return f"give it keys, or remove it for the defaults of {key}"


def _as_list(value: Any, key: str) -> str:
    """A list in place of the one thing that would be in it."""
    if key in _OF_SOURCES and isinstance(value, str):
        return f"write a list: [{_as_source(value)}]"
    if isinstance(value, str):
        return f"write a list: [{value}]"
    return "write a list: [{...}]" if isinstance(value, dict) else "write a list: [...]"


def _as_source(value: str) -> str:
    """A source of prompts that somebody has named by its file, or by its name on the hub."""
    suffixes = Path(value).suffixes
    kind = next((kind for end, kind in _KIND_OF.items() if end in suffixes), "hf")
    return f"{{source: {kind}, path: {value}}}"


def _is_fused_key(value: str) -> bool:
    return re.match(r"[A-Za-z_]\w*:\S", value) is not None and "//" not in value


def _with_space(value: str) -> str:
    name, _, rest = value.partition(":")
    return f"write {name}: {shorten(rest)}, with a space after the colon"


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


def _made_of(value: Any, key: str, source: Source) -> str:
    """The value, and what it was in the file where YAML made something else of it."""
    text = source.texts.get(key, "")
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, datetime.date):
        return f"a date, which YAML makes of {text or value}"
    said = f"{value!r}" if isinstance(value, bool) else _shown(value)
    if isinstance(value, str | list) or not text or text.lower() == str(value).lower():
        return said
    return f"{said}, which YAML makes of {shorten(text)}"


def _shown(value: Any) -> str:
    said = shorten(repr(value))
    return said if isinstance(value, list) else f"{said} ({type(value).__name__})"
