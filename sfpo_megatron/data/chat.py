"""The tokens of a conversation, and which of them the assistant wrote.

By the template's own marks where it has `{% generation %}`; else turn by turn, from what the
template makes of the messages before a turn and with it. Either way what is learned is what the
assistant wrote and the token that ends its turn, and nothing else: that is checked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.taught import Message
from sfpo_megatron.data.turns import unused_mark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENED = re.compile(r"<\w+>\s*\Z")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(kw_only=True, frozen=True, slots=True)
class Marked:
    """A tokenized conversation."""

    token_ids: tuple[int, ...]  # [T]
    learned: tuple[bool, ...]  # [T], the assistant's tokens


@dataclass(kw_only=True, frozen=True, slots=True)
class _Turn:
    """One assistant's turn in the tokens: [start, text_end) is `text`, up to `end` with the token
    that ends it."""

    text: str
    start: int
    text_end: int
    end: int


def _texts(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def continued(prompt: str, text: str) -> str:
    """What of a turn's text follows a prompt that may have opened its thought already (`<think>`,
    as the templates of models that always think do)."""
    found = _OPENED.search(prompt)
    begun = text.lstrip()
    for opener in (found[0], found[0].rstrip()) if found else ():
        if begun.startswith(opener):
            return begun.removeprefix(opener)
    return text


class Chat:
    """Tokenizes conversations by a tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        variables: Mapping[str, Any],
    ) -> None:
        """`stop_ids`: the tokens that end a generation; `variables`: what the template gets besides
        the messages. DataError without a chat template."""
        self._tokenizer, self._variables = tokenizer, variables
        self._stops = frozenset(stop_ids)
        added = tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special}
        self._special = special | set(tokenizer.all_special_ids) | self._stops
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "data.train",
                found="rows of messages with a tokenizer that has no chat template",
                expected="a template that says how a conversation is written",
                fix="add chat_template.jinja to the model directory, or give prompt and completion",
            )
        self._is_marked = bool(_MARKED.search(str(tokenizer.get_chat_template())))

    def marked(self, messages: Sequence[Message], where: str) -> Marked | DataError:
        """The conversation, cut after the assistant's last turn, which ends with a token that also
        ends a generation. DataError, to be reported, for one that the template cannot write."""
        try:
            found = self._by_marks(messages) if self._is_marked else self._by_prefixes(messages)
        except Exception as error:  # whatever a template raises, and how
            why = shorten(" ".join(str(error).split()), 120)
            found = f"messages that the chat template refuses ({type(error).__name__}: {why})"
        if isinstance(found, str):
            return self._refused(where, found)
        token_ids, turns = found
        if turns[0].start == 0:
            return self._refused(where, "a chat template that writes nothing before the assistant")
        for turn in turns:
            text = turn.text
            written = self._decoded(token_ids[turn.start : turn.text_end])
            if not self._is_same(written, text):
                return self._refused(
                    where,
                    f"{shorten(written)} as the assistant's tokens, whose turn is {shorten(text)}",
                )
        learned = [False] * len(token_ids)
        for turn in turns:
            learned[turn.start : turn.end] = [True] * (turn.end - turn.start)
        end = turns[-1].end
        token_ids, learned = token_ids[:end], learned[:end]
        eos = self._tokenizer.eos_token_id
        if token_ids[-1] not in self._stops and eos is not None:
            token_ids, learned = [*token_ids, eos], [*learned, True]
        return Marked(token_ids=tuple(token_ids), learned=tuple(learned))

    def _by_marks(self, messages: Sequence[Message]) -> tuple[list[int], list[_Turn]] | str:
        given = self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self._variables,
        )
        token_ids, mask = list(given["input_ids"]), [bool(m) for m in given["assistant_masks"]]
        starts = [i for i, m in enumerate(mask) if m and not (i and mask[i - 1])]
        stops = [i + 1 for i, m in enumerate(mask) if m and not (i + 1 < len(mask) and mask[i + 1])]
        texts = _texts(messages)
        if len(starts) != len(texts):
            return f"{len(starts)} marked turns of an assistant that has {len(texts)}"
        runs = zip(starts, stops, texts, strict=True)
        return token_ids, [self._turn(token_ids, *run) for run in runs]

    def _turn(self, token_ids: list[int], start: int, stop: int, text: str) -> _Turn:
        """The turn in a run of marked tokens, which may hold its end, with a line break behind
        that, or the text alone. A special token in the text is none of its end."""
        if self._is_same(self._decoded(token_ids[start:stop]), text):
            follows = stop < len(token_ids) and token_ids[stop] in self._special
            return _Turn(text=text, start=start, text_end=stop, end=stop + follows)
        for end in range(stop - 1, start, -1):
            before = token_ids[start:end]
            if token_ids[end] in self._special and self._is_same(self._decoded(before), text):
                return _Turn(text=text, start=start, text_end=end, end=end + 1)
        # Another text: the caller says so.
        return _Turn(text=text, start=start, text_end=stop, end=stop)

    def _by_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], list[_Turn]] | str:
        whole = self._rendered(messages)
        token_ids: list[int] = []
        turns: list[_Turn] = []
        done = 0  # characters of `whole` that have been tokenized
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], prompt=True)
            after = self._rendered(messages[: number + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                return (
                    f"a chat template that writes turn {number + 1} of {len(messages)} in another "
                    "way once the conversation goes on"
                )
            content = message["content"]
            place = self._place(messages[:number], content, before, after)
            if place is None:
                return f"a chat template that does not write {shorten(content)} as it is"
            begin, content = place
            # In pieces, as the engine sees them: a prompt, then what is generated.
            token_ids += self._tokens(whole[done:begin])
            start = len(token_ids)
            token_ids += self._tokens(content)
            text_end = len(token_ids)
            token_ids += self._tokens(after[begin + len(content) :])
            ended = text_end < len(token_ids) and token_ids[text_end] in self._special
            turns.append(_Turn(text=content, start=start, text_end=text_end, end=text_end + ended))
            done = len(after)
        return token_ids, turns

    def _place(
        self, earlier: Sequence[Message], content: str, before: str, after: str
    ) -> tuple[int, str] | None:
        """The character of `after` at which the turn's text begins, and the text as it is written
        there. What is written around it is seen with a mark in its place: the text itself may also
        stand in what the template writes before it, as `n` does in Qwen3's empty thought."""
        mark = unused_mark(earlier, content, self._variables)
        shown = self._rendered([*earlier, {"role": "assistant", "content": mark}])
        start, _, end = shown.partition(mark)
        if shown.count(mark) != 1 or not after.endswith(end):
            return None
        stop = len(after) - len(end)
        for text in (content, content.strip(), content.lstrip(), content.rstrip()):  # many strip it
            begin = stop - len(text)
            if after[begin:stop] != text:
                continue
            if begin < len(before) < stop:  # the generation prompt has opened the text's thought
                return len(before), after[len(before) : stop]
            # A thought that the text begins with is written right after the generation prompt.
            if after[:begin] in (start, before) and len(before) <= begin:
                return begin, text
        return None

    def _rendered(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **self._variables
            )
        )

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _is_same(self, written: str, text: str) -> bool:
        """Whether that is the text, or what the tokenizer leaves of it: some fold characters."""
        return written.strip() in (text.strip(), self._decoded(self._tokens(text.strip())).strip())

    def _refused(self, where: str, found: str) -> DataError:
        mend = "mark them in the template with {% generation %}"
        if self._is_marked:
            mend = "let {% generation %} in the template hold a turn's text and its end alone"
        return DataError(
            where,
            found=found,
            expected="a template that writes the assistant's turns as they are, earlier ones too",
            fix=f"{mend}, give the row as prompt and completion, or set data.on_bad_row=skip",
        )
