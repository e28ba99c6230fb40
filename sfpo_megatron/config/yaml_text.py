"""YAML text -> plain tree: what is ambiguous or would be lost silently is refused, with its line.

PyYAML reads YAML 1.1, where `yes` is true, `010` is 8 and `1:30` is 90. What a value's field wants
is known later (load.py), so the text of each value without quotes is kept in the `Source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from sfpo_megatron.config.origin import ConfigError, Source, join
from sfpo_megatron.errors import shortened

MAX_VALUES = 100_000
"""Values of a tree: aliases of aliases can write billions in ten lines."""

_MERGE = "tag:yaml.org,2002:merge"
_HINTS = (
    ("'\\t'", "indent with spaces, not with tabs"),
    (
        "mapping values are not allowed",
        "write KEY: VALUE, one a line, with a space after the colon, and quote a value with ': '",
    ),
    ("could not find expected ':'", "write KEY: VALUE, with a space after the colon"),
    ("found another document", "keep one document: remove the --- between the two"),
    ("undefined alias", "quote a value that begins with *"),
    ("cannot start any token", "quote a value that begins with this character"),
    ("could not determine a constructor", "remove the tag: values are plain"),
    ("expected <block end>", "indent the keys of a section alike"),
    ("stream end", "close the bracket that is opened there"),
    ("end of stream", "close the quote that is opened there"),
)
_UNREADABLE = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)
"""Exceptions of PyYAML's constructors for values such as 2026-13-45 or `!!int x`."""

Pairs: TypeAlias = Iterator[tuple[yaml.Node, yaml.Node, bool]]


def read_yaml(text: str, key: str, source: Source) -> Any:
    """The value of the dotted `key` (`""`: the whole file) that `text` holds; None if it is empty.
    Raises ConfigError."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise _syntax_error(error, text, key, source) from error
    try:
        node = loader.get_single_node()
        reader = _Reader(text=text, loader=loader, source=source)
        return reader.value(node, key, ()) if node else None
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, key, source) from error
    except RecursionError as error:
        source.lines[""] = loader.line + 1
        raise source.error(
            key,
            found="values nested hundreds of levels deep",
            expected="a config",
            fix="remove the brackets",
        ) from error
    finally:
        loader.dispose()


@dataclass(kw_only=True, slots=True)
class _Reader:
    """Plain Python of the nodes of one document."""

    text: str
    loader: yaml.SafeLoader
    source: Source
    num_values: int = 0

    def value(self, node: yaml.Node, key: str, above: tuple[int, ...]) -> Any:
        """A node as plain Python. `above`: ids of the nodes that hold it."""
        # Of a key the key's line: an alias may stand far from what it names.
        self.source.lines.setdefault(key, node.start_mark.line + 1)
        self._count(node, key, above)
        if node.tag.startswith("!"):
            raise self.source.error(
                key, found=f"the tag {node.tag}", expected="a plain value", fix="remove the tag"
            )
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, join(key, str(index)), above)
                for index, item in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, above)
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, key)

    def _count(self, node: yaml.Node, key: str, above: tuple[int, ...]) -> None:
        if id(node) in above:
            raise self.source.error(
                key, found="an alias to itself", expected="a finite value", fix="remove the alias"
            )
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self.source.error(
                key,
                found=f"more than {MAX_VALUES:,} values, aliases written out",
                expected="a config",
                fix="remove the aliases",
            )

    def _mapping(self, node: yaml.Node, key: str, above: tuple[int, ...]) -> dict[str, Any]:
        """A section; a key that stands twice (YAML keeps the last, silently) is refused."""
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}  # of the section's own keys
        for key_node, value_node, own in self._pairs(node, key, above):
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.source.lines[key] = line
                raise self.source.error(
                    key,
                    found="brackets in the place of a key",
                    expected="a name",
                    fix="write a value that begins with a bracket in quotes",
                )
            name = str(key_node.value)
            child = join(key, name)
            if name in lines and own:
                self.source.lines[child] = line
                raise self.source.error(
                    child,
                    found=f"the key twice (first on line {lines[name]})",
                    expected="each key once",
                    fix="remove one of the two",
                )
            if name in result:
                continue  # the section's own goes before what it merges
            if own:
                lines[name] = line
            self.source.lines[child] = line
            result[name] = self.value(value_node, child, above)
        return result

    def _pairs(self, node: yaml.Node, key: str, above: tuple[int, ...]) -> Pairs:
        """(key, value, own) of a mapping's own keys, then of those that `<<` merges into it."""
        merges = []
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merges.append(value_node)
            else:
                yield key_node, value_node, True
        for merged in merges:
            several = isinstance(merged, yaml.SequenceNode)
            for one in merged.value if several else [merged]:
                self.source.lines[join(key, "<<")] = one.start_mark.line + 1
                if not isinstance(one, yaml.MappingNode):
                    raise self.source.error(
                        join(key, "<<"),
                        found="no section to merge",
                        expected="an alias of a section, or a list of them",
                        fix="write <<: *NAME, where another section is marked &NAME",
                    )
                self._count(one, join(key, "<<"), above)
                for key_node, value_node, _ in self._pairs(one, key, (*above, id(one))):
                    self._count(key_node, key, ())
                    yield key_node, value_node, False

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        if node.style is None:
            self.source.texts[key] = node.value
            rest = self.text[node.end_mark.index :].split("\n", 1)[0]
            if not node.value and rest.lstrip().startswith("#"):
                self.source.comments.add(key)
        try:
            return self.loader.construct_object(node, deep=True)
        except yaml.YAMLError:
            raise
        except _UNREADABLE as error:
            # Of a number with thousands of digits too, which Python does not read.
            text = shorten(node.value) or "nothing"
            raise self.source.error(
                key,
                found=f"{text}, which YAML cannot read as {_kind(node)}",
                expected="a value",
                fix="correct it, or write it in quotes if it is a text",
            ) from error


def _kind(node: yaml.Node) -> str:
    name = str(node.tag).rpartition(":")[2]
    return {"timestamp": "a date", "int": "a number", "float": "a number"}.get(name, f"!!{name}")


def shorten(text: str) -> str:
    """`text` for a message, in one line."""
    return shortened(" ".join(text.split()), 60)


# ---- what PyYAML refuses -----------------------------------------------------------------------


def _syntax_error(error: yaml.YAMLError, text: str, key: str, source: Source) -> ConfigError:
    if key:  # of the command line: one value, and no lines
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or ""
        return source.error(
            key,
            found=f"{shorten(text)!r}" + (f" ({problem})" if problem else ""),
            expected="a YAML value",
            fix="quote it for the shell and for YAML",
        )
    found, fix, line = _described(error, text)
    return ConfigError(
        source.file, "(file)", found=found, expected="valid YAML", fix=fix, line=line
    )


def _described(error: yaml.YAMLError, text: str) -> tuple[str, str, int | None]:
    """What was found, what to do, and the line."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        found = f"the character U+{int(error.character):04X}"
        return found, "remove it, or write it as an escape in double quotes", line
    if not isinstance(error, yaml.MarkedYAMLError):
        return shorten(str(error)), "correct that line", None
    problem = f"{error.problem or ''}, {error.context}" if error.context else error.problem or ""
    problem = problem.removeprefix("found ").removeprefix("but found ")
    said = f"{error.context} {error.problem}"
    fix = next((hint for part, hint in _HINTS if part in said), "correct that line")
    mark = error.problem_mark or error.context_mark
    if error.context_mark and ("opened" in fix or "simple key" in said):
        mark = error.context_mark
    return " ".join(problem.split()), fix, mark.line + 1 if mark else None
