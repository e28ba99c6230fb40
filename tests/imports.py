"""What a file of tests imports of this repository, with all that those import."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

TOPS = ("", "tests", "tests/unit", "tests/dist", "tests/e2e", "tests/slurm", "tests/mutants")
"""The folders that Python looks for a module in: `pythonpath` of pyproject.toml."""


def import_statements(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, dotted module, names taken from it) of every import, those inside functions included.
    AssertionError for a relative one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import absolutely"
            yield node.lineno, node.module or "", tuple(alias.name for alias in node.names)


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names; `from a import b` gives `a` and `a.b`."""
    found = set()
    for _, module, names in import_statements(path):
        found |= {module, *(f"{module}.{name}" for name in names)}
    return frozenset(found)


def closure(root: Path, first: Collection[str], files: Collection[str]) -> set[str]:
    """The files of `files` that are reached from `first`; both are relative to `root`.

    Not seen is what is imported by a name in a string.
    """
    reached, todo = set(first), list(first)
    while todo:
        path = todo.pop()
        found = set(_files(imports(root / path))) & set(files)
        todo += found - reached
        reached |= found
    return reached


def _files(names: Collection[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        for number in range(1, len(parts) + 1):  # whoever imports a.b imports a
            path = "/".join(parts[:number])
            for top in TOPS:
                yield from (f"{top}/{path}{end}".lstrip("/") for end in (".py", "/__init__.py"))
