"""The text of a prompt: system message, prefix, question and suffix, by a chat template or plainly.

A template may print the date. It gets the one of the run's first start, kept with the data cursor:
else the prompts of tomorrow's resume would be other ones.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sfpo_megatron.config.environments import told_tools
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.tools.declared import choices_of, schemas_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"
"""The function by which templates ask for the date."""


class Renderer:
    """Rows to texts."""

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, now: str | None = None
    ) -> None:
        """`now`: the time of the run's first start, as ISO has it; null for this moment."""
        self._data = config.data
        self._tokenizer = tokenizer
        self._now = datetime.fromisoformat(now) if now else datetime.now().replace(microsecond=0)
        self._asked_the_date = False
        template = getattr(tokenizer, "chat_template", None)
        if self._data.chat_template and not template:
            raise DataError(
                "data.chat_template",
                found=f"true with a tokenizer that has none ({config.model.path})",
                expected="a tokenizer with a chat template",
                fix="set data.chat_template=false, or add chat_template.jinja to the model "
                "directory",
            )
        told = told_tools(config.rollout)
        self.variables: dict[str, Any] = {
            **({} if told is None else {"tools": schemas_of(choices_of(told))}),
            **self._data.chat_template_args,
        }
        """What the template gets besides the messages."""
        if _CLOCK in str(template):
            self.variables[_CLOCK] = self._strftime

    @property
    def now(self) -> str | None:
        """The time that the texts depend on; None if they depend on none."""
        return self._now.isoformat() if self._asked_the_date else None

    def text(self, row: Row) -> str:
        """What the tokenizer gets. DataError for a row of which no prompt can be made."""
        question = f"{self._data.prompt_prefix}{row.question}{self._data.prompt_suffix}"
        system = row.system or self._data.system_prompt
        if self._data.chat_template:
            return self._by_template(row, system, question)
        if row.history:
            raise DataError(
                row.where,
                found=f"a conversation of {len(row.history) + 1} turns, and no chat template",
                expected="one message of the user",
                fix="set data.chat_template=true, or leave the row out",
                kind="with a conversation, which needs data.chat_template",
            )
        return f"{system}\n\n{question}" if system else question

    def _by_template(self, row: Row, system: str, question: str) -> str:
        turns = [*([("system", system)] if system else []), *row.history, ("user", question)]
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                add_generation_prompt=True,
                tokenize=False,
                **self.variables,
            )
        except Exception as error:  # whatever a template raises, by raise_exception or by a bug
            raise DataError(
                row.where,
                found=f"a chat template that raises {type(error).__name__}: "
                f"{shorten(str(error), 120)}",
                expected=f"one that takes the roles {', '.join(role for role, _ in turns)}",
                fix="leave the system message or the row out, or set data.chat_template=false",
                kind="that the chat template refuses",
            ) from error
        for role, content in [*turns[:-1], ("user", row.question)]:
            if role != "assistant" and not _contains(text, content):  # thinking may be taken off
                raise DataError(
                    row.where,
                    found=f"a chat template that drops the {role}'s message {shorten(content)}",
                    expected="it in the rendered text",
                    fix="correct the template, or set data.chat_template=false",
                    kind="that the chat template drops",
                )
        return str(text)

    def _strftime(self, form: str) -> str:
        self._asked_the_date = True
        return self._now.strftime(form)


def _contains(text: str, content: str) -> bool:
    """Whether a text has the content, white space aside, perhaps as JSON spells it."""
    if content in text:
        return True
    squeezed = _squeezed(text)
    spellings = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
    return any(_squeezed(spelling) in squeezed for spelling in spellings)


def _squeezed(text: str) -> str:
    return "".join(text.split())
