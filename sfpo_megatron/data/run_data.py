"""All that a run reads before its engines start: `train` trains on it, `check --data` shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.counted import SourceRows
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.data.rows import BadRows
from sfpo_megatron.data.table import PromptTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True, frozen=True, slots=True)
class RunData:
    """The prompts of data.train and data.eval; `bad` is not settled yet."""

    prompts: PromptStream
    held_out: PromptTable
    held_out_sources: tuple[SourceRows, ...]
    """What became of the rows of each source of data.eval."""
    bad: BadRows
    """Bad rows of both, for one report."""

    @staticmethod
    def read(
        config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, now: str | None = None
    ) -> RunData:
        """Read and tokenize every source. DataError for a source that cannot be read, and where no
        prompt is left. `now`: `prompts.date_of` the checkpoint that the run continues from."""
        bad = BadRows(config.data.on_bad_row)
        prompts = PromptStream(config, tokenizer, now=now, bad=bad)
        held_out = eval_prompts(config, tokenizer, now=prompts.now or now, bad=bad)
        kept = Counter(row.source for row in held_out.rows)
        sources = tuple(
            SourceRows(name=name, kept=kept[name], bad=bad.of(name)) for name in prompts.eval_names
        )
        return RunData(prompts=prompts, held_out=held_out, held_out_sources=sources, bad=bad)

    @property
    def summary(self) -> str:
        """What was read, in a line."""
        num_bad = sum(source.num_bad for source in self.held_out_sources)
        left_out = f" ({num_bad} bad rows left out)" if num_bad else ""
        return f"{self.prompts.summary}; {len(self.held_out)} held out{left_out}"
