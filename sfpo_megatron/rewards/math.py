r"""The last \boxed{} of the response equals the reference, as mathematics (math-verify).

Fractions, sets, intervals, units...: `\frac{1}{2}`, `0.5` and `1/2` are one answer. A response
without \boxed{} is wrong, so a model cannot gain by listing candidates. math-verify's own time
limits are off: they use signals; the pool's limit ends what does not end.
"""

from __future__ import annotations

import functools
from typing import Any

from sfpo_megatron.rewards import Problem

_BOXED = r"\boxed{"


def last_boxed(text: str) -> str | None:
    """What is in the last \\boxed{} of `text`, braces matched; None without a whole one."""
    start = text.rfind(_BOXED)
    while start >= 0:
        depth = 0
        for index in range(start + len(_BOXED) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start + len(_BOXED) : index]
        start = text.rfind(_BOXED, 0, start)  # that one was cut off: take one before it
    return None


def score(response: str, prompt: Problem) -> float:
    """1 if the answer is right, else 0."""
    reference = _reference(prompt.answer)
    found = last_boxed(response)
    return float(found is not None and _verify(reference, _parse(found)))


def warm_up() -> None:
    """sympy takes seconds to import."""
    _verify(_parse("1"), _parse("2"))


@functools.lru_cache(maxsize=1024)
def _reference(answer: str) -> list[Any]:
    boxed = last_boxed(answer)
    parsed = _parse(answer if boxed is None else boxed)
    if not parsed:
        raise ValueError(
            f"answer: found {answer!r}, expected a number or an expression in LaTeX; "
            "use reward.function=exact_match for answers that are none"
        )
    return parsed


def _parse(expression: str) -> list[Any]:
    from math_verify import parse

    text = expression.strip().strip("$")
    found: list[Any] = parse(f"{_BOXED}{text}}}", parsing_timeout=None)
    return found


def _verify(reference: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(reference, found, timeout_seconds=None))
