"""Warm-start examples: the prompts of data.train, each with its reference answer and EOS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.prompts import PromptStream

SFTExample = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt token ids, answer token ids with the end-of-sequence token)."""


def sft_examples(config: RunConfig, tokenizer: Any) -> Iterator[SFTExample]:
    """Examples without end, in the order of the run's seed; the same prompts, so with the same
    questions held out, as the RL run that follows."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "model.path",
            found=f"a tokenizer without eos_token ({config.model.path})",
            expected="one that ends a sequence: the policy has to learn to stop",
            fix="set eos_token in tokenizer_config.json",
        )
    stream = PromptStream(config, tokenizer)
    without = next((prompt.id for prompt in stream.prompts if not prompt.answer), None)
    if without is not None:
        raise DataError(
            "data.train",
            found=f"{without}, a problem without a reference answer",
            expected="answers to imitate",
            fix="leave its task out of the warm start; train can use it",
        )
    texts = [prompt.answer for prompt in stream.prompts]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answer_of = {
        prompt.id: (*token_ids, tokenizer.eos_token_id)
        for prompt, token_ids in zip(stream.prompts, answers, strict=True)
    }

    def endless() -> Iterator[SFTExample]:
        while True:
            (prompt,) = stream.next_batch(1)
            yield prompt.token_ids, answer_of[prompt.id]

    return endless()  # so that bad data is an error here, before the model is built
