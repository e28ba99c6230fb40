"""Rows to prompts: token ids, and the length limit. Token ids to the text of a response."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.errors import DataError, shorten
from sfpo_megatron.data.references import References
from sfpo_megatron.data.rendering import Renderer
from sfpo_megatron.data.rows import BadRows, Row
from sfpo_megatron.data.table import PromptTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 2048
"""Rows that are tokenized at a time: as fast as all at once, never all of them as lists."""
_COMPARED = 32


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


def response_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stops: Collection[int]
) -> str:
    """A response as the verifier reads it: without padding and the tokens that end it (`stops`).
    All else stays, such as an <answer> that is a special token of the tokenizer."""
    unread = {tokenizer.eos_token_id, tokenizer.pad_token_id, *stops}
    kept = [token for token in token_ids if token not in unread]
    return str(tokenizer.decode(kept, skip_special_tokens=False))


class Tokens:
    """Token ids of texts, ending where generation begins."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A chat template writes its own special tokens; a plain prompt gets the tokenizer's (BOS).
        self._plain = not config.data.chat_template
        self._before, self._behind = _added(tokenizer) if self._plain else ([], [])
        self._fast: bool | None = None
        self.num_doubled = 0
        """Prompts that began with the beginning token, to which the tokenizer added one."""

    def of(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text."""
        for token_ids in self._encoded(texts):
            yield self._cut(token_ids) if self._before or self._behind else token_ids

    def _encoded(self, texts: list[str]) -> Iterable[list[int]]:
        """Token ids by the backend of a fast tokenizer, which need not look for offsets, if the
        first texts have the same ids in the tokenizer's own call."""
        if self._fast is None:
            few = texts[:_COMPARED]
            own = self._called(few)  # which sets the backend's padding and truncation, too
            self._fast = bool(getattr(self._tokenizer, "is_fast", False)) and (
                self._by_backend(few) == own
            )
        return self._by_backend(texts) if self._fast else self._called(texts)

    def _by_backend(self, texts: list[str]) -> list[list[int]]:
        encode = self._tokenizer.backend_tokenizer.encode_batch_fast
        return [found.ids for found in encode(texts, add_special_tokens=self._plain)]

    def _called(self, texts: list[str]) -> list[list[int]]:
        call = self._tokenizer(texts, add_special_tokens=self._plain)
        return list(call["input_ids"])

    def _cut(self, token_ids: list[int]) -> list[int]:
        """Leave out the end token that the tokenizer adds, and keep one beginning token."""
        end = len(token_ids) - len(self._behind)
        if self._behind and token_ids[end:] == self._behind:
            token_ids = token_ids[:end]
        size = len(self._before)
        doubled = False
        while size and token_ids[size : 2 * size] == self._before:
            token_ids, doubled = token_ids[size:], True
        self.num_doubled += doubled
        return token_ids

    @property
    def said(self) -> list[str]:
        """What was done, if anything was."""
        found = []
        if self._behind:
            names = " ".join(self._tokenizer.convert_ids_to_tokens(self._behind))
            found.append(f"{names}, which the tokenizer appends, was taken off: generation follows")
        if self.num_doubled:
            names = " ".join(self._tokenizer.convert_ids_to_tokens(self._before))
            found.append(f"{self.num_doubled} prompts began with {names} already and have one")
        return found


def tokenized_prompts(
    rows: Sequence[Row],
    config: RunConfig,
    tokens: Tokens,
    renderer: Renderer,
    bad: BadRows,
    *,
    rewarded: bool = True,
) -> PromptTable:
    """A `Prompt` for each row whose prompt fits into rollout.max_prompt_tokens; if `rewarded`, for
    those that their reward can score."""
    references = References(config.reward) if rewarded else None
    limit = config.rollout.max_prompt_tokens
    kept: list[Row] = []
    too_long: list[tuple[str, int]] = []
    all_ids, ends = array("i"), array("q", [0])
    for start in range(0, len(rows), _CHUNK_ROWS):
        good: list[Row] = []
        texts: list[str] = []
        for row in rows[start : start + _CHUNK_ROWS]:
            fault = references.fault(row) if references is not None else None
            try:
                text = renderer.text(row) if fault is None else ""
            except DataError as error:
                fault = error
            if fault is not None:
                bad.report(fault, row.source)
                continue
            good.append(row)
            texts.append(text)
        for row, token_ids in zip(good, tokens.of(texts) if texts else (), strict=True):
            length = len(token_ids)
            if 0 < length <= limit:
                kept.append(row)
                all_ids.extend(token_ids)
                ends.append(len(all_ids))
                continue
            bad.report(_wrong_length(row, length, limit), row.source)
            if length:
                too_long.append((row.id, length))
    return PromptTable(kept, all_ids, ends, renderer.text, too_long)


def _wrong_length(row: Row, length: int, limit: int) -> DataError:
    cure = "raise rollout.max_prompt_tokens" if length else "write a prompt that has one"
    return DataError(
        row.where,
        found=f"a prompt of {length} tokens",
        expected=f"1 to {limit} (rollout.max_prompt_tokens)",
        fix=f"{cure}, or set data.on_bad_row=skip",
        kind="too long" if length else "without a token",
    )


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind every text."""
    bare, full = (
        list(tokenizer(["1"], add_special_tokens=special)["input_ids"][0])
        for special in (False, True)
    )
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
