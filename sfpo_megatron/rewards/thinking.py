"""Which part of a response is its answer: what comes after the thinking, by `reward.thinking`.

`strip` leaves out every `<think>...</think>` (TAG has the other spellings), what stands before a
`</think>` without an opening tag (chat templates often end the prompt with `<think>`), and all that
follows a `<think>` that is never closed: an answer that a model was still considering earns
nothing. `require_closed` also gives nothing to a response without `</think>`. `ignore` takes the
response as it is.
"""

from __future__ import annotations

import re

STRIP, REQUIRE_CLOSED, IGNORE = "strip", "require_closed", "ignore"

TAG = re.compile(
    r"(?i:<(/?)\s*(?:seed:)?think(?:ing)?\s*>)|\[(/?)THINK\]|◁(/?)think▷|"
    r"<\|(?:begin|(end))_of_thought\|>"
)
"""`<think>` as models write it, or `[THINK]`, `<seed:think>`, `◁think▷`, `<|begin_of_thought|>`."""


def closes(tag: re.Match[str]) -> bool:
    """Whether a match of TAG ends the thinking."""
    return any(tag.groups())


def visible(response: str, mode: str = STRIP) -> str:
    """The response without its thinking; time linear in its length."""
    if mode == IGNORE:
        return response
    kept: list[str] = []
    start, inside, closed = 0, False, False
    for tag in TAG.finditer(response):
        if closes(tag):
            if not inside:
                kept.clear()  # it was open from before the response
            start, inside, closed = tag.end(), False, True
        elif not inside:
            kept.append(response[start : tag.start()])
            inside = True
    if not inside:
        kept.append(response[start:])
    if mode == REQUIRE_CLOSED and not closed:
        return ""
    return "".join(kept)
