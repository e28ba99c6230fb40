"""Sample rollouts as a block of lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfpo_megatron.tracking.details import Sample, SampledResponse

_SHOWN = 4
"""Responses of a prompt: as many of the best and of the worst."""


def sample_block(step: int, samples: Sequence[Sample], *, max_chars: int | None = None) -> str:
    """Prompts with their responses, the best first. `max_chars`: every text is cut to that in its
    middle, and of many responses the best and the worst are shown; None: all of all."""
    lines = [f"step {step}: sample rollouts"]
    for sample in samples:
        answer = f"  reference: {_inline(sample.answer)}" if sample.answer else ""
        lines += [f"  prompt {sample.prompt_id}{answer}", *_quoted(sample.prompt, max_chars)]
        ranked = sorted(sample.responses, key=lambda one: -one.reward)
        left_out = 0 if max_chars is None else max(0, len(ranked) - _SHOWN)
        shown = ranked if not left_out else [*ranked[: _SHOWN // 2], *ranked[-_SHOWN // 2 :]]
        for number, response in enumerate(shown):
            if left_out and number == _SHOWN // 2:
                lines.append(f"  ({left_out} more in samples.jsonl)")
            lines += [f"  {_verdict(response)}", *_quoted(response.text, max_chars)]
    return "\n".join(lines)


def _verdict(response: SampledResponse) -> str:
    parts = "".join(f"  {name} {value:g}" for name, value in response.parts.items())
    length = f"{response.num_tokens} tokens{'' if response.finished else ', cut'}"
    right = "correct" if response.correct else "not correct"
    return f"reward {response.reward:g}  {right}  {length}{parts}"


def _quoted(text: str, max_chars: int | None) -> Iterator[str]:
    if max_chars is not None and len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    for line in text.split("\n") if text else [""]:
        yield f"    | {_printable(line)}".rstrip()


def _inline(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(line: str) -> str:
    """A line without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)
