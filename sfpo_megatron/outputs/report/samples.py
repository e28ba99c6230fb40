"""Sample rollouts of a run, cut to what a page can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sfpo_megatron.outputs.report.curves import finite

_MOST_PROMPTS = 60
_MOST_RESPONSES = 8
_MOST_CHARS = 4_000
_CHARS_OF_ALL_RUNS = 500_000


def shown_samples(lines: Sequence[Mapping[str, Any]], *, num_runs: int) -> list[dict[str, Any]]:
    """Prompts with their responses, in the order of their steps; where there are too many, those of
    steps evenly apart, the first and the last among them."""
    samples = [_sample(line) for line in lines]
    chars = _CHARS_OF_ALL_RUNS // num_runs
    for most in (_MOST_PROMPTS, 30, 15, 8, 4, 2):
        kept = _evenly(samples, most)
        if sum(_length(sample) for sample in kept) <= chars:
            return kept
    return kept


def _sample(line: Mapping[str, Any]) -> dict[str, Any]:
    responses = line.get("responses")
    found = (
        [one for one in responses if isinstance(one, dict)] if isinstance(responses, list) else []
    )
    return {
        "step": finite(line.get("step")),
        "prompt": _cut(line.get("prompt")),
        "answer": _cut(line.get("answer", line.get("reference", ""))),
        "responses": [_response(one) for one in found[:_MOST_RESPONSES]],
        "num_more": max(0, len(found) - _MOST_RESPONSES),
    }


def _response(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": _cut(found.get("text")),
        "reward": finite(found.get("reward")),
        "detail": ", ".join(_details(found)),
    }


def _details(found: Mapping[str, Any]) -> Iterator[str]:
    """What else is known of a response, in words."""
    for name, value in found.items():
        match name, value:
            case ("text" | "reward", _) | (_, None) | ("finished", True):
                continue
            case "finished", False:
                yield "cut off"
            case "correct", bool():
                yield "correct" if value else "wrong"
            case "num_tokens", int():
                yield f"{value:,} tokens"
            case "parts", dict():
                yield from (f"{part} {_said(one)}" for part, one in value.items())
            case _:
                yield f"{name} {_said(value)}"


def _said(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case _:
            return _cut(value)[:200]


def _cut(text: Any) -> str:
    """Text, cut in the middle where it is long: its end has the answer."""
    text = "" if text is None else str(text)
    if len(text) <= _MOST_CHARS:
        return text
    half = _MOST_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def _evenly(samples: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    if len(samples) <= most:
        return samples
    return [samples[round(i * (len(samples) - 1) / (most - 1))] for i in range(most)]


def _length(sample: Mapping[str, Any]) -> int:
    texts = (len(one["text"]) + len(one["detail"]) for one in sample["responses"])
    return len(sample["prompt"]) + sum(texts)
