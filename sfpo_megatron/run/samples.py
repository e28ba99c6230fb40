"""Picks the sample rollouts of a train step that `tracking.samples` asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sfpo_megatron.config.tree import SamplesConfig
from sfpo_megatron.tracking.details import Sample, SampledResponse
from sfpo_megatron.types import Prompt, Rollout


class SamplePicker:
    """Remembers the prompts of the steps whose rollouts are going to be shown."""

    def __init__(self, config: SamplesConfig) -> None:
        self._config = config
        self._asked: dict[int, dict[str, Prompt]] = {}

    def asked(self, step: int, prompts: Iterable[Prompt]) -> None:
        """Rollouts of these prompts have been asked for."""
        every = self._config.every
        if every and (step == 1 or step % every == 0):
            self._asked[step] = {prompt.id: prompt for prompt in prompts}

    def pick(self, step: int, rollouts: Sequence[Rollout], group_size: int) -> tuple[Sample, ...]:
        """The first groups of a step; empty where none are to be shown."""
        prompts = self._asked.pop(step, None)
        if prompts is None:
            return ()
        last = self._config.num_prompts * group_size
        groups = (rollouts[at : at + group_size] for at in range(0, last, group_size))
        return tuple(_sample(group, prompts) for group in groups if group)


def _sample(group: Sequence[Rollout], prompts: Mapping[str, Prompt]) -> Sample:
    prompt = prompts[group[0].prompt_id]
    return Sample(
        prompt_id=prompt.id,
        prompt=prompt.text,
        answer=prompt.answer,
        responses=tuple(
            SampledResponse(
                text=rollout.text,
                reward=rollout.reward,
                correct=rollout.correct,
                finished=rollout.finished,
                num_tokens=rollout.num_generated,
                parts=dict(rollout.parts),
            )
            for rollout in group
        ),
    )
