"""One problem from a record of a file: our two columns, or verl's.

{"prompt": "6 * 7 =", "answer": "42"}
{"prompt": [{"role": "user", "content": "6 * 7 ="}], "reward_model": {"ground_truth": "42"},
 "data_source": ..., "extra_info": ...}
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.taught import (
    COMPLETION,
    MESSAGES,
    completion_text,
    conversation_row,
)

SHAPE = 'an object such as {"prompt": "6 * 7 =", "answer": "42"}'
_USED = ("prompt", "answer", "reward_model")
SYSTEM = "system"
"""Key of a row's metadata: the system message before the question."""


def row_of(value: Any, *, where: str, row_id: str) -> Row | DataError:
    """Further keys are kept as the prompt's metadata."""
    if not isinstance(value, dict):
        fix = "write one object a line"
        return DataError(where, found=shorten(value), expected=SHAPE, fix=fix)
    model = value.get("reward_model")
    if "answer" not in value and isinstance(model, dict) and "ground_truth" in model:
        value = {**value, "answer": model["ground_truth"]}
    for name in ("prompt", "answer"):
        if name not in value:
            found = f"no key {name!r} (keys: {shorten(sorted(value))})"
            missing = DataError(where, found=found, expected=SHAPE, fix=f"add {name!r}")
            return _unrewarded(value, missing, row_id)
    metadata = {key: item for key, item in value.items() if key not in _USED}
    question, answer = value["prompt"], value["answer"]
    if isinstance(question, list):
        messages = _messages(question)
        if messages is None:
            return DataError(
                where,
                found=f"prompt = {shorten(question)}",
                expected="one user message, or a system message before it",
                fix="flatten the conversation, or leave the row out",
            )
        system, question = messages
        if system:
            metadata[SYSTEM] = system
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = _number_text(answer)
    for name, text in (("prompt", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            found = f"{name} = {shorten(value[name])}"
            expected = "a string that is not empty"
            return DataError(where, found=found, expected=expected, fix=f"correct {name!r}")
    for name, item in metadata.items():
        if not _is_json(item):
            return DataError(
                where,
                found=f"{name} = {shorten(item)} (a {type(item).__name__})",
                expected="further columns that JSON can hold: they go to the scoring processes",
                fix=f"make {name!r} text or a plain number, or leave it out",
            )
    return Row(id=row_id, where=where, question=question, answer=answer, metadata=metadata)


def _unrewarded(value: dict[str, Any], missing: DataError, row_id: str) -> Row | DataError:
    """The row of a record without a reference, for `sft` alone; `missing` if it teaches nothing."""
    if "prompt" not in value and MESSAGES in value:
        return conversation_row(value[MESSAGES], missing, row_id=row_id)
    if "prompt" not in value or value.get(COMPLETION) is None:
        return missing
    text = completion_text(value[COMPLETION], missing.where)
    if isinstance(text, DataError):
        return text
    row = row_of({**value, "answer": text}, where=missing.where, row_id=row_id)
    return row if isinstance(row, DataError) else replace(row, unrewarded=missing)


def _is_json(item: object) -> bool:
    try:
        json.dumps(item)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _messages(messages: list[Any]) -> tuple[str, str] | None:
    """(system message or nothing, question); None for another kind of conversation."""
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return None
    texts = [m["content"] for m in messages]
    roles = [m.get("role") for m in messages]
    if roles == ["user"]:
        return "", texts[0]
    return (texts[0], texts[1]) if roles == ["system", "user"] else None


def _number_text(answer: int | float) -> str:
    """A reference that was written as a number, as text: `42`, not `42.0`."""
    return str(int(answer)) if float(answer).is_integer() else repr(answer)
