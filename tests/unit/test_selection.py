"""Dynamic sampling: which groups are answered and how every drop is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made.rollouts import group

from sfpo_megatron.rollout.rounds import jobs_of
from sfpo_megatron.rollout.selection import GroupSelection, fault, outcome
from sfpo_megatron.types import Prompt, Rollout


def names(rollouts: list[Rollout]) -> list[str]:
    return [rollout.prompt_id for rollout in rollouts if rollout.sample == 0]


MIXED, SAME = [0.0, 1.0], [1.0, 1.0]


def test_nothing_is_dropped_unasked() -> None:
    selection = GroupSelection(2, ())
    selection.add([group("a", SAME), group("b", MIXED, finished=False)])
    assert selection.is_full
    rollouts, counts = selection.result()
    assert names(rollouts) == ["a", "b"] and len(rollouts) == 4
    assert (counts.num_rounds, counts.num_groups, counts.num_surplus) == (1, 2, 0)


def test_dropped_groups_are_replaced_in_prompt_order() -> None:
    selection = GroupSelection(3, ("zero_variance", "truncated"))
    selection.add([group("a", SAME), group("b", MIXED), group("c", MIXED, finished=False)])
    assert not selection.is_full
    selection.add([group("b", MIXED), group("d", MIXED), group("e", SAME)])
    assert not selection.is_full  # b is not used twice
    selection.add([group("f", MIXED), group("g", MIXED), group("h", SAME)])
    assert selection.is_full
    rollouts, counts = selection.result()
    assert names(rollouts) == ["b", "d", "f"]
    assert counts.num_rounds == 3 and counts.num_groups == 9
    assert counts.num_zero_variance == 3 and counts.num_truncated == 1
    assert counts.num_duplicate == 1 and counts.num_surplus == 1 and counts.num_taken_back == 0
    dropped = counts.num_zero_variance + counts.num_truncated + counts.num_duplicate
    assert counts.num_groups == 3 + dropped + counts.num_surplus - counts.num_taken_back


def test_rewards_that_training_takes_for_equal_are_equal() -> None:
    """They are float32 there; sums of turn rewards differ in the last bit of float64."""
    near = [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1]
    assert near[0] != near[1]
    assert fault(group("a", near), ("zero_variance",)) == "zero_variance"
    assert outcome(group("a", near)) == "failed"
    assert fault(group("a", [0.6, 0.6001]), ("zero_variance",)) is None


def test_a_group_is_truncated_when_all_of_it_is() -> None:
    """One response that ended says something about the others."""
    cut = group("a", MIXED, finished=False)
    one_ended = [replace(cut[0], prompt_id="b"), replace(cut[1], prompt_id="b", finished=True)]
    selection = GroupSelection(1, ("truncated",))
    selection.add([cut, one_ended])
    rollouts, counts = selection.result()
    assert names(rollouts) == ["b"] and counts.num_truncated == 1


def test_when_rounds_run_out_dropped_groups_come_back() -> None:
    selection = GroupSelection(3, ("zero_variance",))
    selection.add([group("a", SAME), group("b", MIXED)])
    selection.add([group("c", SAME), group("d", SAME)])
    rollouts, counts = selection.result()
    assert names(rollouts) == ["b", "a", "c"]
    assert counts.num_taken_back == 2 and counts.num_zero_variance == 3


@pytest.mark.parametrize("num_samples", [1, 3, 8, 40])
def test_jobs_hold_every_sample_once_and_siblings_together(num_samples: int) -> None:
    prompts = [
        Prompt(id=f"p/{i}", text="", token_ids=(1,), question="", answer="") for i in range(7)
    ]
    jobs = jobs_of(prompts, num_samples)
    pairs = [(prompt.id, sample) for job in jobs for prompt, sample in job]
    assert pairs == [(prompt.id, s) for prompt in prompts for s in range(num_samples)]
    homes = {(prompt.id, number) for number, job in enumerate(jobs) for prompt, _ in job}
    assert len(homes) == len(prompts)
    assert max(map(len, jobs)) <= max(16, num_samples)
