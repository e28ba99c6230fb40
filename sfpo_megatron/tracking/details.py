"""What a line of metrics cannot hold of a train step: distributions, and sample rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COLUMNS = (
    *("step", "prompt_id", "prompt", "answer", "response"),
    *("reward", "correct", "finished", "num_tokens", "parts"),
)
"""The columns of `Details.rows`."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SampledResponse:
    """One response, and what became of it."""

    text: str
    reward: float
    correct: bool
    finished: bool
    """True: it ended by itself; False: cut at rollout.max_response_tokens."""
    num_tokens: int
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward function returned besides the reward, by name; of a sum, what each function
    gave."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Sample:
    """A prompt of a train step with all its responses."""

    prompt_id: str
    prompt: str
    """What the tokenizer saw."""
    answer: str
    """The reference answer; empty where the task has none."""
    responses: tuple[SampledResponse, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Sample:
        """The sample that `to_json` made plain."""
        responses = tuple(SampledResponse(**one) for one in value["responses"])
        return Sample(**{**value, "responses": responses})


@dataclass(kw_only=True, frozen=True, slots=True)
class Details:
    """The details of one train step."""

    step: int
    distributions: Mapping[str, Sequence[float]]
    """Name -> one value for each rollout."""
    samples: tuple[Sample, ...]
    """Those that tracking.samples asks for; empty at most steps."""

    def rows(self) -> list[list[Any]]:
        """The samples as a table of `COLUMNS`, a row a response."""
        return [
            [
                *(self.step, sample.prompt_id, sample.prompt, sample.answer, one.text),
                *(one.reward, one.correct, one.finished, one.num_tokens, dict(one.parts)),
            ]
            for sample in self.samples
            for one in sample.responses
        ]
