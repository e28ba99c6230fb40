"""One problem from a record of a file: our two columns, those of other trainers, or mapped ones.

{"prompt": "6 * 7 =", "answer": "42"}
{"prompt": [{"role": "user", "content": "6 * 7 ="}], "reward_model": {"ground_truth": "42"},
 "data_source": ..., "extra_info": ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.taught import (
    COMPLETION,
    MESSAGES,
    completion_text,
    conversation_row,
    template_fault,
)
from sfpo_megatron.data.values import (
    Cell,
    absent,
    as_list,
    is_text,
    json_only,
    message_text,
    number_text,
)

SHAPE = 'an object such as {"prompt": "6 * 7 =", "answer": "42"}'
_TEXT = {
    "prompt": "a string that is not empty",
    "answer": "a string that is not empty, or a finite number",
}
_TURNS = (
    "text, or messages of text: a user's, after a system message or none, or user and assistant in "
    "turns up to a user's"
)
_ALWAYS_USED = frozenset({"prompt", "answer", "reward_model"})
SYSTEM = "system"
"""Key of a row's metadata: the system message of its conversation."""
METADATA = "metadata"
_ROLES = {"user": "assistant", "assistant": "user"}
"""Role of a turn -> of the next."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Layout:
    """Names of the columns that a problem comes in."""

    trainer: str = ""
    """Name of the trainer whose they are; empty for ours."""
    prompt: str = "prompt"
    answer: str = "answer"
    """Dots lead into objects."""


OURS = Layout()
LAYOUTS = (
    OURS,
    Layout(trainer="verl", answer="reward_model.ground_truth"),
    Layout(trainer="slime", answer="label"),
    Layout(trainer="OpenRLHF", prompt="input", answer="label"),
    Layout(trainer="OpenRLHF", prompt="input"),
    Layout(trainer="NeMo-RL", prompt="input", answer="output"),
    Layout(trainer="NeMo-RL", prompt="problem", answer="expected_answer"),
)
_INSTRUCTION = "instruction"
"""Alpaca's column: its `input` is only what the instruction is about."""
NAMES = frozenset(name.partition(".")[0] for at in LAYOUTS for name in (at.prompt, at.answer))
"""Columns that may be a problem's prompt or answer."""


class _Missing:
    """What a row does not have."""


def row_of(
    value: Any,
    *,
    where: str,
    row_id: str,
    columns: Mapping[str, str] | None = None,
    left_out: tuple[str, ...] = (),
) -> Row | DataError:
    """The problem of a record. `columns`: DataSource's; `left_out`: columns that its reader has
    left out already. Further keys are kept as the prompt's metadata."""
    if not isinstance(value, dict):
        fix = "write one object a line"
        return DataError(where, found=shorten(value), expected=SHAPE, fix=fix, kind="no object")
    columns = columns or {}
    layout = _mapped(columns) if columns else _layout(value)
    missing = _missing(value, layout, where, left_out)
    if missing is not None:
        return _unrewarded(value, missing, layout, row_id, columns, left_out)
    prompt, given = _at(value, layout.prompt), _at(value, layout.answer)
    conversation = _conversation(prompt)
    if conversation is None:
        return DataError(where, found=f"prompt = {shorten(prompt)}", expected=_TURNS,
                         fix="correct or remove the row", kind="no conversation")  # fmt: skip
    system, history, question = conversation
    answer = given if isinstance(given, str) else number_text(given) or ""
    for name, item, text in (("prompt", prompt, question), ("answer", given, answer)):
        if not text.strip():
            missing = _blank(name, item, where)
            if not absent(item):
                return missing
            # A column that is null says no more than one that is not there.
            return _unrewarded(value, missing, layout, row_id, columns, left_out)
    metadata = _metadata(value, columns, layout)
    if system:
        metadata[SYSTEM] = system
    mapped = _at(value, columns[SYSTEM]) if SYSTEM in columns else None
    if not isinstance(mapped, str | _Missing) and not absent(mapped):
        found, fix = f"{columns[SYSTEM]} = {shorten(mapped)}", "correct the row, or columns"
        return DataError(where, found=found, expected="a system message of text", fix=fix,
                         kind="with an unusable system message")  # fmt: skip
    if not system and isinstance(mapped, str) and mapped.strip():
        system = mapped
    for text in (question, answer, system, *(content for _, content in history)):
        if not is_text(text):
            return DataError(where, found=f"half of a surrogate pair in {shorten(text)}",
                             expected="text that UTF-8 can hold", fix="correct or remove the row",
                             kind="not Unicode text")  # fmt: skip
    metadata, not_json = json_only(metadata)
    return Row(
        id=row_id,
        where=where,
        question=question,
        answer=answer,
        metadata=metadata,
        system=system,
        history=history,
        layout=layout.trainer,
        left_out=left_out + not_json if not_json else left_out,
        lacks=_lacking(value, columns),
    )


def _missing(
    value: dict[str, Any], layout: Layout, where: str, left_out: tuple[str, ...]
) -> DataError | None:
    """The first column that a problem needs and a record has not."""
    for name, key in (("prompt", layout.prompt), ("answer", layout.answer)):
        if isinstance(_at(value, key), _Missing):
            keys = f"no key {key!r} (keys: {shorten(sorted(map(str, value)))}"
            keys += f"; JSON cannot hold {', '.join(left_out)})" if left_out else ")"
            fix = f"add {key!r}, or name yours in the source's columns"
            kind = f"without {name}"
            return DataError(where, found=keys, expected=SHAPE, fix=fix, kind=kind)
    return None


def _blank(name: str, item: Cell, where: str) -> DataError:
    """What is wrong with a prompt or an answer whose text is nothing but spaces."""
    kind = f"without {name}" if absent(item) else f"with an unusable {name}"
    found, fix = f"{name} = {shorten(item)}", f"correct {name!r}"
    return DataError(where, found=found, expected=_TEXT[name], fix=fix, kind=kind)


def _lacking(value: dict[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Which of `system` and `metadata` are mapped to a column that the record does not have."""
    return tuple(
        name
        for name in (SYSTEM, METADATA)
        if name in columns and isinstance(_at(value, columns[name]), _Missing)
    )


def _mapped(columns: Mapping[str, str]) -> Layout:
    return Layout(
        prompt=columns.get("prompt", OURS.prompt), answer=columns.get("answer", OURS.answer)
    )


def _unrewarded(
    value: dict[str, Any],
    missing: DataError,
    layout: Layout,
    row_id: str,
    columns: Mapping[str, str],
    left_out: tuple[str, ...],
) -> Row | DataError:
    """The row of a record without a reference, for `sft` alone; `missing` if it teaches nothing."""
    prompt = _at(value, layout.prompt)
    asked = not (isinstance(prompt, _Missing) or absent(prompt))
    completed = asked and value.get(COMPLETION) is not None
    if not completed and value.get(MESSAGES) is None:
        return missing
    if (fault := template_fault(value, missing.where)) is not None:
        return fault
    if not completed:
        found = conversation_row(value[MESSAGES], missing, row_id=row_id)
        if isinstance(found, Row):
            return replace(found, lacks=_lacking(value, columns))
        return found
    text = completion_text(value[COMPLETION], missing.where)
    if isinstance(text, DataError):
        return text
    given = {**value, layout.answer: text}
    row = row_of(given, where=missing.where, row_id=row_id, columns=columns, left_out=left_out)
    return row if isinstance(row, DataError) else replace(row, unrewarded=missing)


def _layout(value: dict[str, Any]) -> Layout:
    """The layout of a record: the first with a prompt and an answer; where there are none, the
    first that comes close."""
    close = OURS
    for layout in LAYOUTS:
        if layout.prompt not in value or (layout.prompt == "input" and _INSTRUCTION in value):
            continue
        answer = _at(value, layout.answer)
        if not isinstance(answer, _Missing):
            if not absent(answer):
                return layout
            close = layout if close is OURS and "answer" not in value else close
    return close


def _at(value: dict[str, Any], key: str) -> Any:
    """The value of a column, of an object's field for a key with dots."""
    if key in value:
        return value[key]
    name, _, rest = key.partition(".")
    inner = value.get(name)
    return _at(inner, rest) if rest and isinstance(inner, dict) else _Missing()


def _metadata(value: dict[str, Any], columns: Mapping[str, str], layout: Layout) -> dict[str, Any]:
    if METADATA in columns:
        item = _at(value, columns[METADATA])
        # What the row teaches stays with it, whatever its metadata is to be.
        taught = {COMPLETION: value[COMPLETION]} if COMPLETION in value else {}
        if isinstance(item, _Missing) or item is None:
            return taught
        return {**(item if isinstance(item, dict) else {columns[METADATA]: item}), **taught}
    used = {layout.prompt, layout.answer} if columns else {*_ALWAYS_USED, layout.prompt,
                                                           layout.answer}  # fmt: skip
    return {key: item for key, item in value.items() if key not in used}


def _conversation(prompt: Cell) -> tuple[str, tuple[tuple[str, str], ...], str] | None:
    """(system message or nothing, turns before, question); None for another conversation."""
    if isinstance(prompt, str):
        return "", (), prompt
    prompt = as_list(prompt)
    if not isinstance(prompt, list):
        return "", (), ""
    turns = [(_role(message), message_text(message)) for message in prompt]
    system = ""
    if turns and turns[0][0] == "system":
        if turns[0][1] is None:
            return None
        system, turns = turns[0][1], turns[1:]
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        return None
    texts = [(role, text) for role, text in turns if text is not None]
    follows = all(_ROLES.get(a) == b for (a, _), (b, _) in pairwise(turns))
    if len(texts) < len(turns) or not follows:
        return None
    return system, tuple(texts[:-1]), texts[-1][1]


def _role(message: Cell) -> str:
    return str(message.get("role")) if isinstance(message, dict) else ""
