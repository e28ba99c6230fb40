"""An environment of your own: the model answers, is told to check itself, and answers again.

    sfpo-megatron train CONFIG rollout.environment=environment:AnswerThenCheck

from this folder, or with it on PYTHONPATH. docs/extend.md describes the parts.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.types import Prompt


class AnswerThenCheck:
    """Two turns. What it says between them is read by the model and not trained on."""

    text = "\nCheck your answer:\n"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._check = tokenizer.encode(self.text, add_special_tokens=False)

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        """One rollout."""
        episode = Episode().then(await generate(prompt.token_ids))
        if episode.finished:  # else rollout.max_response_tokens is used up
            episode = episode.told(self._check)
            episode = episode.then(await generate((*prompt.token_ids, *episode.token_ids)))
        return replace(episode, metrics={"tokens": sum(episode.response_mask)})
