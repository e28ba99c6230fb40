"""Rows to prompts: suffix, chat template, token ids, and the length limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.columns import SYSTEM
from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.rows import BadRows, Row
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; code that comes with a model is never run. DataError
    where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers raise: KeyError, Exception...
        raise DataError(
            "model.path",
            found=f"a tokenizer in {path} that transformers cannot load "
            f"({type(error).__name__}: {shorten(str(error))})",
            expected="the model's tokenizer.json",
            fix="download the model's tokenizer again",
        ) from error


def tokenized_prompts(
    rows: Iterable[Row], config: RunConfig, tokenizer: PreTrainedTokenizerBase, bad: BadRows
) -> Iterator[Prompt]:
    """A `Prompt` for each row that fits into `rollout.max_prompt_tokens`."""
    rows = list(rows)
    if not rows:
        return
    texts = [_text(row, config, tokenizer) for row in rows]
    # A chat template writes its own special tokens; a plain prompt gets the tokenizer's (BOS).
    plain = not config.data.chat_template
    all_ids = tokenizer(texts, add_special_tokens=plain)["input_ids"]
    limit = config.rollout.max_prompt_tokens
    for row, text, token_ids in zip(rows, texts, all_ids, strict=True):
        if not 0 < len(token_ids) <= limit:
            bad.report(
                DataError(
                    row.where,
                    found=f"a prompt of {len(token_ids)} tokens",
                    expected=f"1 to {limit} (rollout.max_prompt_tokens)",
                    fix="raise rollout.max_prompt_tokens, or set data.on_bad_row=skip",
                )
            )
            continue
        yield Prompt(
            id=row.id,
            text=text,
            token_ids=tuple(token_ids),
            question=row.question,
            answer=row.answer,
            metadata=row.metadata,
            reward=row.reward,
        )


def _text(row: Row, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    question = row.question + config.data.prompt_suffix
    system = row.metadata.get(SYSTEM)
    if not config.data.chat_template:
        return f"{system}\n\n{question}" if system else question
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "data.chat_template",
            found=f"true with a tokenizer that has none ({config.model.path})",
            expected="a tokenizer with a chat template",
            fix="set data.chat_template=false, or add chat_template.jinja to the model directory",
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text
