"""How an answer was read, as a line for a person."""

from __future__ import annotations

import reprlib

from sfpo_megatron.rewards.answer_kinds import Answer, Chain, Choice, Group, Matrix, Named, Text
from sfpo_megatron.rewards.quantities import Value

_MAX_CHARS = 200


def shown(answer: Answer) -> str:
    """The answer as it is compared: 1/2, {1, 2}, x = 5, [1, 2)..."""
    text = _shown(answer)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


def _shown(answer: Answer) -> str:
    match answer:
        case Value():
            exact = answer.exact
            try:
                said = str(exact)
            except (ValueError, RecursionError):  # more digits than Python writes
                said = reprlib.repr(exact)
            return (
                said + ("%" if answer.percent else "") + (f" {answer.unit}" if answer.unit else "")
            )
        case Text():
            return f"the text {answer.words!r}"
        case Choice():
            return f"choice {answer.letter}" + (f" ({answer.text})" if answer.text else "")
        case Named():
            return f"{answer.name} = {_shown(answer.value)}"
        case Chain():
            signs = (*answer.signs, "")
            sides = zip(map(_shown, answer.sides), signs, strict=True)
            return " ".join(f"{side} {sign}" for side, sign in sides).rstrip()
        case Matrix():
            rows = ("[" + ", ".join(map(_shown, row)) + "]" for row in answer.rows)
            return f"matrix [{', '.join(rows)}]"
        case Group():
            items = list(map(_shown, answer.items))
            if answer.opening == "u":
                return " or ".join(items)
            inside = ", ".join(items)
            return (
                f"{answer.opening}{inside}{answer.closing}" if answer.opening else f"list {inside}"
            )
