"""Which part of a response is its answer: what comes after the thinking, by `reward.thinking`.

`strip` leaves out every `<think>...</think>`, what stands before a `</think>` without an opening
tag (chat templates often end the prompt with `<think>`), and all that follows a `<think>` that is
never closed: an answer that a model was still considering earns nothing. `require_closed` also
gives nothing to a response without `</think>`. `ignore` takes the response as it is.
"""

from __future__ import annotations

import re

STRIP, REQUIRE_CLOSED, IGNORE = "strip", "require_closed", "ignore"

_TAG = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)


def visible(response: str, mode: str = STRIP) -> str:
    """The response without its thinking; time linear in its length."""
    if mode == IGNORE:
        return response
    kept: list[str] = []
    start, inside, closed = 0, False, False
    for tag in _TAG.finditer(response):
        if tag[1]:
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
