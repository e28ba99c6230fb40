"""Docstrings are sentences on their own (PEP 257): none continues the name above it.

"Number of trainer GPUs.", not "Of the trainer." below `num_gpus`. Held for modules, classes,
functions and the texts below fields. Not exercised: whether the rest of a docstring reads well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("sfpo_megatron", "tests", "tools", "benchmarks", "examples")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
CONTINUES = re.compile(r"(Of|As|Whose|Where|See|That of)\b")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings(code: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands alone as a statement: docstrings of modules, classes
    and functions, and of the fields above them."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text.strip()


def fragments(path: Path) -> list[str]:
    """Docstrings of a file that are no sentences on their own."""
    found = docstrings(path.read_text(encoding="utf-8"))
    return [f"{path.name}:{line}: {text[:60]}" for line, text in found if CONTINUES.match(text)]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_docstrings_are_sentences(path: Path) -> None:
    assert not fragments(path)


def test_the_check_finds_fragments(tmp_path: Path) -> None:
    """Each place of a docstring counts; a word that only begins alike does not."""
    file = tmp_path / "x.py"
    file.write_text(
        '"""Of a module."""\n'
        "class A:\n"
        '    """Whose class."""\n'
        "    size: int\n"
        '    """As a field."""\n'
        "    async def f(self):\n"
        '        """\n        Where it is."""\n'
        "def g():\n"
        '    """Offsets, Assets and Seen things."""\n'
    )
    assert sorted(fragments(file)) == [
        "x.py:1: Of a module.",
        "x.py:3: Whose class.",
        "x.py:5: As a field.",
        "x.py:7: Where it is.",
    ]
