"""Parts of an answer outside of its brackets."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\[{}|]|\\[A-Za-z]+|\\.|[(\[{)\]}]|[^(\[{)\]}]", re.DOTALL)


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of `text` outside of brackets, and the separators between them."""
    parts, signs, depth, start, index, bar = [], [], 0, 0, 0, False
    while index < len(text):
        found = separator.match(text, index) if depth == 0 and not bar else None
        if found and found.end() > index:
            parts.append(text[start:index])
            signs.append(found.group().strip())
            start = index = found.end()
            continue
        token = _TOKEN.match(text, index)
        assert token is not None
        piece = token.group()
        if piece == "|" and depth == 0:
            bar = not bar
        depth += (piece in ("(", "[", "{", r"\{")) - (piece in (")", "]", "}", r"\}"))
        index = token.end()
    parts.append(text[start:])
    return parts, signs


def balanced(text: str) -> bool:
    """Whether every bracket has its other half."""
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if depth < 0:
            return False
    return depth == 0
