r"""What stands in the \boxed{} and \fbox{} of a text: the last ones, braces matched.

`\boxed {42}` and `\boxed 42` are boxes too. A box that is cut off is none, and so is one of more
than MAX_CHARS. Of many boxes only the last MAX_BOXES are looked at, so that no text takes long.
"""

from __future__ import annotations

import re

from sfpo_megatron.rewards.hostile import MAX_CHARS

MAX_BOXES = 64
_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Without braces: a sign, then a number, a letter or a command, up to what cannot belong to it.
_BARE = re.compile(r"[-+]?(?:[0-9.,]*[0-9]|\\?[A-Za-z]+)(?:\s*\\?%)?")


def boxes(text: str, limit: int = MAX_BOXES) -> list[str]:
    """The last `limit` whole boxes of `text`, in its order; of nested ones the inner."""
    found: list[str] = []
    end = len(text)
    looked_at = 0
    while len(found) < limit and looked_at < MAX_BOXES:
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        looked_at += 1
        content = _content(text, start)
        if content is not None:
            found.append(content)
        end = start
    return found[::-1]


def last_boxed(text: str) -> str | None:
    r"""What is in the last \boxed{} or \fbox{} of `text`; None without a whole one."""
    found = boxes(text, limit=1)
    return found[0] if found else None


def _content(text: str, start: int) -> str | None:
    command = _COMMAND.match(text, start)
    if command is None:
        return None
    begin = command.end()
    if not text.startswith("{", begin):
        bare = _BARE.match(text, begin)
        return bare.group() if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, begin, begin + MAX_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[begin + 1 : brace.start()]
    return None
