r"""The response has the form that was asked for, whatever it answers: a share of a weighted sum.

1 if it thinks at most once, in `<think>...</think>` at its beginning, and then gives one answer
that is not empty: one \boxed{} or one pair `<answer>...</answer>`, or one in the other. Else 0.
"""

from __future__ import annotations

import re

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.boxes import last_boxed
from sfpo_megatron.rewards.tagged import tagged
from sfpo_megatron.rewards.thinking import IGNORE, REQUIRE_CLOSED, STRIP, TAG, closes
from sfpo_megatron.rewards.wire import Explanation

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """1 for the right form, else 0. With `thinking: require_closed` it must think, with `ignore`
    what it thinks counts as its answer."""
    answer = response if thinking == IGNORE else _after_thinking(response, thinking)
    if answer is None:
        return 0.0
    opened, closed = answer.count("<answer>"), answer.count("</answer>")
    num_boxes = len(_BOX.findall(answer))
    if opened != closed or opened > 1 or num_boxes > 1 or opened + num_boxes == 0:
        return 0.0
    in_tags = tagged(answer) if opened else "a box alone"
    in_box = last_boxed(answer) if num_boxes else "tags alone"
    if not in_tags or in_box is None or not in_box.strip():
        return 0.0
    apart = opened and num_boxes and not (_BOX.search(in_tags) or "<answer>" in in_box)
    return float(not apart)


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read: what follows the thinking."""
    answer = response if thinking == IGNORE else _after_thinking(response, thinking)
    return {"found": answer, "read": [], "reference": "any one answer", "reference_read": []}


def _after_thinking(response: str, thinking: str) -> str | None:
    """What follows the thinking; None if that has not the form."""
    tags = list(TAG.finditer(response))
    if not tags:
        return response if thinking != REQUIRE_CLOSED else None
    if not closes(tags[-1]) or len(tags) > 2:
        return None
    if len(tags) == 2:  # with one, the prompt ended with the opening tag
        opening = tags[0]
        if closes(opening) or response[: opening.start()].strip():
            return None
    return response[tags[-1].end() :]
