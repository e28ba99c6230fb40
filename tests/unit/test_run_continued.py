"""A run that is continued on other terms: evaluations and a batch begun ahead that it lets go, a
gate that stays closed.

Engines are stand-ins; the checkpoints that are kept by it: test_run_saving.py.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config
from made.rollouts import group, scored_request
from made.run_states import RUN, save

from sfpo_megatron.checkpoints.identity import RunRecord
from sfpo_megatron.checkpoints.store import store_of
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.reports import ScoredRequest
from sfpo_megatron.run import opening
from sfpo_megatron.run.continuing import decide
from sfpo_megatron.run.feed import EngineFeed
from sfpo_megatron.run.held_out import Best, print_of
from sfpo_megatron.run.same_gate import closed_by_others
from sfpo_megatron.run.sinks import open_sinks
from sfpo_megatron.types import Prompt, Rollout


class Client:
    """Answers each request with given rollouts, and remembers what was asked for."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts, self.requests = rollouts, list[Any]()

    def submit(self, request: Any) -> None:
        self.requests.append(request)

    def collect_scored(self, request_id: str, refit: Any) -> ScoredRequest:
        return scored_request(self.rollouts)


def test_evaluations_of_other_questions_are_forgotten() -> None:
    """A start that evaluates drops them; one on saved rollouts keeps them for the next."""
    easy = Best("easy")
    easy.observe(3, 0.9)
    kept = Best()
    kept.load_state_dict(easy.state_dict())
    assert (kept.value, kept.has_forgotten) == (0.9, False)
    for state in (easy.state_dict(), kept.state_dict()):
        hard, same = Best("hard"), Best("easy")
        hard.load_state_dict(state)
        same.load_state_dict(state)
        assert (hard.value, hard.value_at(3), hard.has_forgotten) == (None, None, True)
        assert (same.value, same.value_at(3), same.has_forgotten) == (0.9, 0.9, False)
    before = Best("hard")
    before.load_state_dict([3, 0.5])  # by the version before, which does not say
    assert (before.value, before.has_forgotten) == (0.5, False)


def test_what_an_accuracy_hangs_on() -> None:
    def asked(*answers: str, source: str = "eval.a", **sections: Any) -> str:
        prompts = [
            Prompt(id=f"{source}/{i}", text="", token_ids=(i,), question="", answer=answer)
            for i, answer in enumerate(answers)
        ]
        return print_of(run_config(**sections), prompts)

    once = asked("1", "2")
    same: tuple[dict[str, Any], ...] = (
        {"source": "eval.b"},
        {"eval": {"n": 8, "every": 3, "stop_at": 0.5}},
    )
    assert [asked("1", "2", **one) for one in same] == [once, once]
    others: tuple[dict[str, Any], ...] = (
        {"eval": {"temperature": 0.0}},
        {"eval": {"top_p": 0.9}},
        {"eval": {"max_response_tokens": 99}},
        {"reward": {"function": "math"}},
        {"reward": {"thinking": "ignore"}},
        {"rollout": {"environment": "math_tool"}},
    )
    changed = [asked("1", "2", **one) for one in others]
    changed += [asked("1", "3"), asked("1"), asked("1", "2", "3")]
    assert len({once, *changed}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("now", "asked"), [({}, False), ({"group_size": 4}, True), ({"prompts_per_step": 3}, True)]
)
def test_a_batch_of_another_size_is_let_go(
    now: dict[str, int], asked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was begun ahead, and the run goes on with other sizes, which its minibatches may not
    divide."""
    sizes = {"prompts_per_step": 1, "minibatches_per_step": 1, "group_size": 2, "num_steps": 3}
    prompts: Any = SimpleNamespace(
        state_dict=dict,
        load_state_dict=lambda state: None,
        next_batch=lambda count, history: [],
        has_changed=False,
    )
    given: Any = Client(group("sums/0", [0.0, 1.0]))
    before = EngineFeed(run_config(train=sizes), given, prompts)
    before.collect(1, lambda: None)
    before.hand_back(1)
    config = run_config(train=sizes | now)
    train = config.train
    size = train.prompts_per_step * train.group_size
    again: Any = Client(group("sums/0", [0.0] * size))
    after = EngineFeed(config, again, prompts)
    after.load_state_dict(before.state_dict())
    batch = after.collect(1, lambda: None)
    assert (batch.num_rollouts, bool(again.requests)) == (size, asked)
    assert ("train step 1: its 2 rollouts" in capsys.readouterr().err) is asked


@pytest.mark.parametrize("own", [True, False])
def test_lines_of_what_ran_here_do_not_lead_up_to_another_runs_checkpoint(
    tmp_path: Path, own: bool
) -> None:
    """It died before its first checkpoint, and the next start takes one from elsewhere."""
    here, other = str(tmp_path / "run"), str(tmp_path / "other")
    resume = "auto" if own else f"{other}/checkpoints"
    config = run_config(
        output_dir=here, tracking={"sinks": ("jsonl",)}, checkpoint={"resume": resume}
    )
    RunRecord.new(run_id=RUN).write(RunDirectory.of(here))
    save(config if own else run_config(output_dir=other), 2)
    metrics, steps = RunDirectory.of(here).metrics, (1, 2, 3)
    metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    start = decide(config, store_of(config), fresh=False)
    assert start.continued_step == 2
    with ExitStack() as closing:
        open_sinks(config, config, start, closing, num_steps=5, said=[])
    assert [json.loads(line)["step"] for line in metrics.open()] == ([1, 2] if own else [])
    assert metrics.with_name("metrics.previous-1.jsonl").exists() is not own


OF_ITS_RULE: list[dict[str, Any]] = [
    {"entropy_zscore_threshold": 3.0},
    {"entropy_window": 50},
    {"entropy_relative_threshold": 0.1},
    {"entropy_patience": 4},
    {"entropy_window_excludes_newest": True},
    {"entropy_warmup_steps": 5},
    {"trigger": "two_sided"},
]


def closed_at_90(tripped: bool = True) -> dict[str, Any]:
    """run_state.json of a run with the defaults."""
    config = json.loads(json.dumps(asdict(run_config())))
    return {"step": 90, "gate": {"tripped": tripped}, "config": config}


@pytest.mark.parametrize("changed", OF_ITS_RULE, ids=lambda changed: next(iter(changed)))
def test_a_gate_that_stays_closed_whatever_is_set_is_said(changed: dict[str, Any]) -> None:
    (said,) = closed_by_others(run_config(sfpo=changed), closed_at_90())
    ((key, value),) = changed.items()
    assert "by step 90" in said and f"sfpo.{key}: " in said and f" -> {value})" in said
    assert not [*closed_by_others(run_config(sfpo=changed), closed_at_90(tripped=False))]
    for decides_nothing in ({"latch": False}, {"num_fast_passes": 0}):
        assert not [*closed_by_others(run_config(sfpo=changed | decides_nothing), closed_at_90())]


def test_other_settings_than_the_gates_say_nothing_of_it() -> None:
    for sfpo in ({}, {"alpha": 0.9, "stop_step": 200, "num_fast_passes": 2}):
        assert not [*closed_by_others(run_config(sfpo=sfpo), closed_at_90())]


def test_a_start_warns_of_its_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rank 0, once there is somewhere to say it, and before any engine starts."""
    config = run_config(output_dir=str(tmp_path), sfpo={"entropy_zscore_threshold": 3.0})
    save(config, 90, json.dumps(closed_at_90()))
    start = decide(config, store_of(config), fresh=False)
    data: Any = SimpleNamespace(prompts=SimpleNamespace(epoch_size=40))

    class Said(Exception):
        """Far enough: engines would start."""

    def important(text: str) -> None:
        raise Said(text)

    for name, stand_in in {
        "ControlGroup": lambda _: SimpleNamespace(rank=0),
        "find": lambda *_, **__: start,
        "read_data": lambda *_: data,
        "hold_to_model": lambda *_: None,
        "held_to": lambda *_: (data, []),
        "open_sinks": lambda *_, **__: SimpleNamespace(important=important),
    }.items():
        monkeypatch.setattr(opening, name, stand_in)
    with pytest.raises(Said, match="stays closed"), opening.open_run(config):
        pass
