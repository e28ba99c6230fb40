"""What a chat template writes between two turns of the assistant, as tokens to append.

The assistant's own tokens are never written again: what it generated stays as it is, and what the
template puts behind it is found once, in a conversation that stands for any. That holds only for a
template that writes a conversation by adding to it, which is checked when this is made.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sfpo_megatron.data.errors import DataError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
_MARK = "THE-TURN"
_QUESTION = {"role": "user", "content": "What is it?"}
_SHOWN_TOKENS = 12
_NEVER = r"(?!)"


def unused_mark(*given: object) -> str:
    """A text that stands for a turn, and in nothing of what is given."""
    mark = _MARK
    while mark in str(given):
        mark += "-TURN"
    return mark


class TurnTemplate:
    """The turns of a tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any],
        stop_ids: Collection[int],
        *,
        role: str,
    ) -> None:
        """`variables`: what the template gets besides the messages; `stop_ids`: tokens that end a
        generation; `role`: who speaks between the assistant's turns. DataError for a template that
        cannot be appended to."""
        self._tokenizer, self._variables, self._role = tokenizer, dict(variables), role
        if not getattr(tokenizer, "chat_template", None):
            raise self._refused(
                "a tokenizer without a chat template", "add chat_template.jinja to the model's"
            )
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
        longest_first = sorted(special, key=len)[::-1]
        self._special = re.compile("|".join(map(re.escape, longest_first)) or _NEVER)
        self.end_id = self._check(frozenset(stop_ids))
        """The token with which the template ends the assistant's turn."""

    def text(self, token_ids: Sequence[int]) -> str:
        """A turn of the assistant, to be read and never encoded again."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def tokens_of(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation from its start, and the beginning of the assistant's next turn. Special
        tokens in the text of messages are left out here too."""
        return tuple(self._tokens(self._rendered(self._without_special(messages))))

    def tokens_after_turn(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What follows the token that has ended the assistant's turn: `messages`, and the beginning
        of its next turn. Special tokens in the text of messages are left out: no one else may end a
        turn."""
        return tuple(self._tokens(self._after(messages))[1:])

    def _after(self, messages: Sequence[Message]) -> str:
        said = self._without_special(messages)
        mark = unused_mark(said, self._variables)  # whoever speaks may say it too
        text = self._rendered([_QUESTION, {"role": "assistant", "content": mark}, *said])
        if text.count(mark) != 1:
            raise self._refused(
                "a chat template that does not write the assistant's turn once, as it is",
                "correct the template",
            )
        return text.partition(mark)[2]

    def _without_special(self, messages: Sequence[Message]) -> list[Message]:
        return [{**self._plain(m), "role": m["role"]} for m in messages]

    def _plain(self, value: Any) -> Any:
        """The same with no special token in any of its texts."""
        if isinstance(value, str):
            shorter = self._special.sub("", value)
            # Another may appear where one is left out, and so on: a line ends there then, and a
            # page that has a million inside of one another costs no more than two looks.
            return self._special.sub("\n", value) if self._special.search(shorter) else shorter
        if isinstance(value, Mapping):
            return {self._plain(key): self._plain(item) for key, item in value.items()}
        return [self._plain(item) for item in value] if isinstance(value, list) else value

    def _check(self, stop_ids: frozenset[int]) -> int:
        """One turn, and one more behind it: what is appended piece by piece is the whole."""
        results = [[self._said("one")], [self._said("two"), self._said("three")]]
        turns = ["The first turn.", "The second turn."]
        pieces = [self._rendered([_QUESTION])]
        conversation: list[Message] = [_QUESTION]
        for turn, messages in zip(turns, results, strict=True):
            pieces += [turn, self._after(messages)]
            conversation += [{"role": "assistant", "content": turn}, *messages]
        appended = [token for piece in pieces for token in self._tokens(piece)]
        whole = self._tokens(self._rendered(conversation))
        if appended != whole:
            raise self._parts(appended, whole)
        end, *_ = self._tokens(self._after(results[0])) or [-1]
        if end not in stop_ids:
            ending = self.text([end]) if end >= 0 else "nothing"
            raise self._refused(
                f"a chat template that ends the assistant's turn with {ending!r}, and generation "
                f"ends with {', '.join(repr(self.text([token])) for token in sorted(stop_ids))}",
                "add its id to eos_token_id in generation_config.json",
            )
        return end

    def _parts(self, appended: list[int], whole: list[int]) -> DataError:
        pairs = zip(appended, whole, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(appended), len(whole)))
        shown = [self.text(ids[at : at + _SHOWN_TOKENS]) for ids in (appended, whole)]
        return self._refused(
            f"a chat template that writes earlier turns in another way once the conversation goes "
            f"on: from token {at} on, {shorten(shown[0])} was appended and the whole has "
            f"{shorten(shown[1])}",
            "make the template write every turn alike, whatever follows it",
        )

    def _said(self, content: str) -> Message:
        return {"role": self._role, "name": "tool", "content": content}

    def _rendered(self, messages: Sequence[Message]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=True,
                    **self._variables,
                )
            )
        except Exception as error:  # whatever a template raises, and how
            why = shorten(" ".join(str(error).split()), 120)
            raise self._refused(
                f"a chat template that refuses the role {self._role} ({type(error).__name__}: "
                f"{why})",
                "take a template with tools",
            ) from error

    def _tokens(self, text: str) -> list[int]:
        # What a tool or a client has read from JSON may hold half of a surrogate pair.
        said = text.encode(errors="replace").decode()
        return list(self._tokenizer(said, add_special_tokens=False)["input_ids"])

    def _refused(self, found: str, fix: str) -> DataError:
        return DataError(
            f"chat template of {self._tokenizer.name_or_path}",
            found=found,
            expected=f"one to which turns of the {self._role} can be appended",
            fix=f"{fix}, or set rollout.environment=single_turn",
        )
