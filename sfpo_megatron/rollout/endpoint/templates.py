"""A client's messages as tokens, by the chat template: whole, or what follows an earlier turn."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.turns import Message, TurnTemplate
from sfpo_megatron.rollout.endpoint.protocol import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_KEPT = 64  # sets of tools that clients bring
_MOST_HALVES = 64  # tokens in a row that are no text: all of a row are decoded with each of them


class ChatTemplates:
    """The tokenizer's chat template, for any set of tools."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any],
        stop_ids: Collection[int],
    ) -> None:
        """DataError for a template to which turns of the user cannot be appended."""
        self._tokenizer, self._variables = tokenizer, dict(variables)
        self._stops = frozenset(stop_ids)
        self._template = lru_cache(maxsize=_NUM_KEPT)(self._made)
        self._plain = self._template("", "user")
        self.end_id = self._plain.end_id
        """What a turn ends with that was cut."""

    def whole(self, messages: Sequence[Message], tools: str) -> tuple[int, ...]:
        """The conversation from its start, up to where the assistant speaks."""
        try:
            return self._template(tools, "user").tokens_of(messages)
        except DataError as error:
            raise _refused(error) from None

    def after_turn(self, messages: Sequence[Message], tools: str) -> tuple[int, ...]:
        """What follows a turn of the assistant that has ended by itself."""
        try:
            templates = [self._template(tools, role) for role in {m["role"] for m in messages}]
            return templates[0].tokens_after_turn(messages)
        except DataError as error:
            raise _refused(error) from None

    def turn_text(self, token_ids: Sequence[int]) -> str:
        """A turn of the assistant, without the token that ends it."""
        ended = bool(token_ids) and token_ids[-1] in self._stops
        return self._plain.text(token_ids[: len(token_ids) - ended])

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text. A character that several share is the last one's."""
        texts: list[str] = []
        begin = read = 0  # decoded from `begin` on: text depends on what is before it
        for end in range(1, len(token_ids) + 1):
            text = self._plain.text(token_ids[begin:end])
            is_half = text.endswith("\N{REPLACEMENT CHARACTER}") and end - read < _MOST_HALVES
            if is_half and end < len(token_ids):
                texts.append("")
                continue
            texts.append(text[len(self._plain.text(token_ids[begin:read])) :])
            begin, read = read, end
        return texts

    def _made(self, tools: str, role: str) -> TurnTemplate:
        told = {"tools": json.loads(tools)} if tools else {}
        return TurnTemplate(self._tokenizer, {**told, **self._variables}, self._stops, role=role)


def _refused(error: DataError) -> ApiError:
    return ApiError(str(error), param="messages", code="chat_template")
