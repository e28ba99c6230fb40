"""docs/troubleshooting.md: each message that it quotes stands in the source.

Not exercised: that a run says it when the page's reason holds; the tests of each part do that.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
SHORTEST = 10
"""Letters of a fixed part that say something: a part alone may be in any file."""


def messages() -> list[str]:
    """What is quoted in the first cell of a row. Names of metrics and keys are no messages."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| You see"):
            first = line.split(" | ")[0]
            found += [text for text in re.findall(r"`([^`]+)`", first) if " " in text]
    return found


def fixed_parts(message: str) -> list[str]:
    return [part.strip() for part in message.split("...") if part.strip()]


@functools.cache
def source_texts() -> frozenset[str]:
    """Every string of the package, each f-string cut where it puts something in."""
    files = (ROOT / "sfpo_megatron").rglob("*.py")
    return frozenset(text for file in files for text in texts_of(ast.parse(file.read_text())))


def texts_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)):
                yield text


def missing(message: str) -> list[str]:
    return [part for part in fixed_parts(message) if not any(part in t for t in source_texts())]


def test_there_are_some() -> None:
    assert len(messages()) > 50
    assert len(set(messages())) == len(messages())


@pytest.mark.parametrize("message", messages())
def test_the_message_is_in_the_source(message: str) -> None:
    assert max(map(len, fixed_parts(message))) >= SHORTEST, "too short to be looked for"
    assert not missing(message)


def test_the_check_finds_what_is_gone() -> None:
    assert missing("output_dir: found another walk in ...") == ["output_dir: found another walk in"]
    assert missing("a prompt of ... tokens") == []
