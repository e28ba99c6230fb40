"""What a row teaches: a worked `completion`, the assistant's turns in `messages`, or its `answer`.

{"prompt": "6 * 7 =", "completion": "6 * 7 is 42."}
{"messages": [{"role": "user", "content": "6 * 7 ="}, {"role": "assistant", "content": "42"}]}

Rows without a reference are for `sft` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.values import Cell, absent, as_list, is_text, message_text

MESSAGES, COMPLETION = "messages", "completion"
ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant has written beside its content. Each template writes them in its own
way, or not at all, so that what is learned could not be held against them."""

_FOR_TEMPLATE = ("tools", "chat_template_kwargs")
"""Columns that other trainers give the chat template with the messages."""


def conversation_row(given: Cell, missing: DataError, *, row_id: str) -> Row | DataError:
    """The row of a record that has `messages` in place of what `missing` says."""
    messages = _messages(given, missing.where)
    if isinstance(messages, DataError):
        return messages
    return Row(
        id=row_id,
        where=missing.where,
        question=next(m["content"] for m in messages if m["role"] == "user"),
        answer=messages[-1]["content"],
        metadata={MESSAGES: messages},
        unrewarded=missing,
    )


def template_fault(value: Mapping[str, Any], where: str) -> DataError | None:
    """What a record wants its chat template to be given, and which nothing reads."""
    key = next((key for key in _FOR_TEMPLATE if not _is_empty(value.get(key))), None)
    if key is None:
        return None
    return DataError(
        where,
        found=f"{key} = {shorten(value[key])}, which is not read",
        expected="a row that says in its text all that the template is to write",
        fix=f"leave {key} out, and give data.chat_template_args what every row has in common",
    )


def completion_of(row: Row) -> str | DataError:
    """What comes after the prompt: the completion, or the answer where there is none."""
    if COMPLETION in row.left_out:
        return DataError(
            row.where,
            found="a completion that JSON cannot hold (half of a surrogate pair, a date, bytes)",
            expected="text, or one assistant's message of role and content",
            fix="write it as text, without the fields that are none, or leave the row out",
            kind="with a completion that JSON cannot hold",
        )
    given = row.metadata.get(COMPLETION)
    if given is None or given == "":
        return row.answer
    return completion_text(given, row.where)


def messages_of(row: Row) -> list[Message]:
    """The conversation of a row without a completion and an answer; empty for others."""
    if row.unrewarded is None or COMPLETION in row.metadata:
        return []
    return row.metadata.get(MESSAGES, [])


def lesson_of(row: Row) -> str:
    """What the row teaches: equal for rows that teach the same. A bad one is like no other: its
    message names its place."""
    return json.dumps(messages_of(row)) if messages_of(row) else str(completion_of(row))


def completion_text(given: Cell, where: str) -> str | DataError:
    """Text, or the one assistant's message that it stands in."""
    given = as_list(given)
    one = given[0] if isinstance(given, list) and len(given) == 1 else None
    is_message = isinstance(one, dict) and one.get("role") == "assistant"
    if is_message and (beside := _beside_content(one)):
        return DataError(
            where,
            found=f"a completion with {beside}",
            expected="all that is to be learned in its content",
            fix=f"write {beside} into content, in the form that the policy is to write",
        )
    text = message_text(one) if is_message else given
    if isinstance(text, str) and text.strip():
        return text
    return DataError(
        where,
        found=f"completion = {shorten(given)}",
        expected="a string that is not empty",
        fix="write the worked solution there, or leave the row out",
    )


def _beside_content(message: Cell) -> str:
    """The first key of a message that says more than its content; nothing without one."""
    if not isinstance(message, dict):
        return ""
    return next((key for key in _BESIDE_CONTENT if not _is_empty(message.get(key))), "")


def _is_empty(value: Cell) -> bool:
    """Whether it says nothing: null too, with which columns of structs are filled up."""
    value = as_list(value)
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(_is_empty, value)) if isinstance(value, list) else absent(value)


def _messages(given: Cell, where: str) -> list[Message] | DataError:
    """Up to the assistant's last turn: nothing is learned from what follows."""

    def wrong(found: str, fix: str) -> DataError:
        expected = 'a list such as [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
        return DataError(where, found=found, expected=expected, fix=fix)

    given = as_list(given)
    if not isinstance(given, list) or not given:
        return wrong(f"messages = {shorten(given)}", "write the conversation as a list")
    messages: list[Message] = []
    for number, message in enumerate(given):
        if beside := _beside_content(message):
            fix = f"write {beside} into content, in the form that the policy is to write"
            return wrong(f"messages[{number}] with {beside}, which is not read", fix)
        said = message if isinstance(message, dict) else {}
        role, weight = said.get("role"), said.get("weight")
        if role == "assistant" and not absent(weight) and weight != 1:
            fix = "cut the conversation there, or leave the row out"
            return wrong(f"messages[{number}] has weight {shorten(weight)}", fix)
        content = message_text(message)
        if not isinstance(role, str) or role not in ROLES or content is None:
            found = f"messages[{number}] = {shorten(message)}"
            return wrong(found, f"give it a role ({', '.join(ROLES)}) and a content that is text")
        if role in ("user", "assistant") and not content.strip():
            return wrong(f"messages[{number}] = {shorten(message)}", "fill in its content")
        if not is_text(content):
            found = f"half of a surrogate pair in messages[{number}] = {shorten(content)}"
            return wrong(found, "correct or remove the row")
        messages.append({"role": role, "content": content})
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return wrong(f"messages by {', '.join(roles)} alone", "add the assistant's turn")
    last = len(roles) - roles[::-1].index("assistant")
    if "user" not in roles[:last]:
        return wrong("messages in which the assistant answers no user", "add the user's turn")
    return messages[:last]
