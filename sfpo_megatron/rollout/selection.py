"""Which groups of a request are answered: dropped ones are replaced round by round (dynamic
sampling, DAPO, arXiv 2503.14476, section 3.2), and every drop is counted.

Deterministic: groups are taken in the order of their prompts, not of their completion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ctypes import c_float

from sfpo_megatron.data.selective import Outcome
from sfpo_megatron.rollout.reports import SamplingCounts
from sfpo_megatron.types import Rollout

Group = Sequence[Rollout]


def fault(group: Group, drop: Sequence[str]) -> str | None:
    """Which of the kinds in `drop` the group is of."""
    if "zero_variance" in drop and len(_rewards(group)) == 1:
        return "zero_variance"
    if "truncated" in drop and not any(rollout.finished for rollout in group):
        return "truncated"
    return None


def outcome(group: Group) -> Outcome:
    """What the next rollouts of the group's prompt are likely to be too."""
    if len(_rewards(group)) > 1:
        return "mixed"
    return "solved" if all(rollout.correct for rollout in group) else "failed"


def _rewards(group: Group) -> set[float]:
    """The different rewards, in the precision in which they are trained on: 0.1 + 0.2 + 0.3 is no
    other reward than 0.3 + 0.2 + 0.1."""
    return {c_float(rollout.reward).value for rollout in group}


class GroupSelection:
    """Fed a round of groups at a time, until `is_full`."""

    def __init__(self, num_groups: int, drop: Sequence[str]) -> None:
        self._num_groups = num_groups
        self._drop = drop
        self._good: list[Group] = []
        self._dropped: list[Group] = []
        self.outcomes: dict[str, Outcome] = {}
        """What every generated group was, answered or not."""
        self._faults: Counter[str] = Counter()
        self._num_rounds = 0
        self._num_scored = 0

    @property
    def is_full(self) -> bool:
        return len(self._good) >= self._num_groups

    def add(self, groups: Sequence[Group]) -> None:
        """One round, in the order of its prompts."""
        self._num_rounds += 1
        self._num_scored += len(groups)
        # Of this round too: a request may name a prompt twice and means it.
        seen_before = set(self.outcomes)
        for group in groups:
            if group[0].prompt_id not in seen_before:
                self.outcomes[group[0].prompt_id] = outcome(group)
            if group[0].prompt_id in seen_before:
                self._faults["duplicate"] += 1  # its seeds too are the same: nothing new
            elif kind := fault(group, self._drop):
                self._faults[kind] += 1
                self._dropped.append(group)
            else:
                self._good.append(group)

    def result(self) -> tuple[list[Rollout], SamplingCounts]:
        """Exactly the groups that were asked for, where there are as many; and the counts."""
        missing = max(0, self._num_groups - len(self._good))
        taken_back = self._dropped[:missing]
        groups = [*self._good[: self._num_groups], *taken_back]
        counts = SamplingCounts(
            num_rounds=self._num_rounds,
            num_groups=self._num_scored,
            num_surplus=max(0, len(self._good) - self._num_groups),
            num_taken_back=len(taken_back),
            **{f"num_{kind}": number for kind, number in self._faults.items()},
        )
        return [rollout for group in groups for rollout in group], counts
