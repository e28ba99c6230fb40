"""What the loop counts, keeps and asks for: one line each, which nothing else would miss.

Parts that a line does not touch are stand-ins: no model, no engine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made.batches import make_batch
from made.configs import run_config
from made.rollouts import scored_request
from ragged import cut, ragged

from sfpo_megatron import sft
from sfpo_megatron.config.objective import KLConfig, ObjectiveConfig
from sfpo_megatron.config.tree import EvalConfig
from sfpo_megatron.mcore.passes import MinibatchResult, PassResult
from sfpo_megatron.mcore.reference_policy import rollout_kl
from sfpo_megatron.rollout.errors import FleetLost
from sfpo_megatron.rollout.reports import ScoredRequest
from sfpo_megatron.run import learner
from sfpo_megatron.run.feed import EngineFeed
from sfpo_megatron.run.held_out import Best, EngineEvaluation, is_due
from sfpo_megatron.run.metrics import Totals, batch_metrics, split_metrics
from sfpo_megatron.run.saved_rollouts import RolloutSaver, SavedFeed
from sfpo_megatron.tracking.timers import Timers
from sfpo_megatron.types import Minibatch, Rollout, RolloutBatch


def rollout(**settings: Any) -> Rollout:
    plain: dict[str, Any] = {
        "prompt_id": "eval.sums/0",
        "sample": 0,
        "prompt_token_ids": (1, 2),
        "token_ids": (3, 4),
        "generator_logprobs": (-0.5, -0.25),
        "response_mask": (True, True),
        "finished": True,
        "text": "",
        "reward": 0.0,
        "correct": False,
        "weight_version": 0,
    }
    return Rollout(**(plain | settings))


def test_accuracy_counts_what_is_correct() -> None:
    """A partial reward is a reward, and no correct answer."""
    lengths = torch.ones(4, dtype=torch.int64)
    rewards = torch.tensor([0.1, 1.0, 0.0, 0.1])
    batch = make_batch(lengths, lengths, rewards=rewards, correct=rewards == 1)
    found = batch_metrics(batch, Totals())
    assert found["accuracy"] == 0.25 and found["reward_mean"] == pytest.approx(0.3)


def test_a_batch_keeps_what_was_judged() -> None:
    """Whether an answer is correct is the verifier's word, not the reward's size."""
    judged = [(0.5, False), (1.0, True), (0.0, True), (-1.0, False)]
    found = RolloutBatch.from_rollouts([rollout(reward=r, correct=c) for r, c in judged], 2)
    assert found.correct.tolist() == [correct for _, correct in judged]
    assert found.rewards.tolist() == [reward for reward, _ in judged]


def test_padding_is_a_share_of_what_is_computed() -> None:
    parts = [
        Minibatch(
            microbatches=(),
            global_valid_tokens=1,
            global_num_sequences=1,
            global_tokens=tokens,
            global_padded_tokens=padded,
        )
        for tokens, padded in ((30, 40), (30, 80))
    ]
    assert split_metrics(parts) == {"num_microbatches": 0, "padding": 0.5}


@pytest.mark.parametrize(("every", "wanted"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_the_last_step_is_always_evaluated(every: int, wanted: list[int]) -> None:
    config = run_config(train={"num_steps": 5}, eval={"every": every})
    assert [step for step in range(1, 6) if is_due(config, step)] == wanted


class Client:
    """Answers each request with given rollouts, and remembers what was asked for."""

    def __init__(self, *rollouts: Rollout) -> None:
        self.rollouts, self.requests = list(rollouts), list[Any]()

    def submit(self, request: Any) -> None:
        self.requests.append(request)

    def collect(self, request_id: str, refit: Any) -> list[Rollout]:
        return self.rollouts

    def collect_scored(self, request_id: str, refit: Any) -> ScoredRequest:
        return scored_request(self.rollouts)


def test_an_evaluation_samples_at_its_own_temperature() -> None:
    client: Any = Client(rollout(correct=True, reward=1.0), rollout())
    config = run_config(rollout={"temperature": 0.7, "max_response_tokens": 9})
    config = replace(config, eval=EvalConfig(temperature=0.3, n=2))
    metrics = EngineEvaluation(config, client, [])(4, lambda: None)
    (request,) = client.requests
    assert (request.temperature, request.num_samples, request.top_p) == (0.3, 2, 1.0)
    assert (request.max_response_tokens, request.step) == (9, 4)
    assert metrics["eval/accuracy"] == 0.5


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize("age", [0, 1, 2])
def test_rollouts_older_than_allowed_are_refused(age: int, allowed: int) -> None:
    step = 5
    client: Any = Client(*(rollout(weight_version=step - 1 - age) for _ in range(2)))
    config = run_config(rollout={"async_steps": allowed})
    train = replace(
        config.train, prompts_per_step=1, minibatches_per_step=1, group_size=2, num_steps=step
    )
    prompts: Any = SimpleNamespace(state_dict=dict, next_batch=lambda count, history: [])
    feed = EngineFeed(replace(config, train=train), client, prompts)
    if age > allowed:
        with pytest.raises(RuntimeError, match=rf"{age} updates old.*async_steps={allowed}"):
            feed.collect(step, lambda: None)
    else:
        assert feed.collect(step, lambda: None).weight_version == step - 1 - age
        assert feed.metrics["staleness"] == age
        assert feed.prompt_ids == ("eval.sums/0",)  # one for the two rollouts of a group
    assert [request.step for request in client.requests] == [step]  # and none behind the last


def test_a_cursor_is_of_the_first_step_under_way() -> None:
    """With async_steps the next one is begun too; a resumed run begins both again, with the prompts
    that they had. So are prompts of rounds that nobody needed."""
    drawn: list[int] = []

    class Prompts:
        position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

        def next_batch(self, count: int, history: object) -> list[int]:
            drawn.append(self.position)
            self.position += count
            return list(range(self.position - count, self.position))

    config = run_config(
        train={"prompts_per_step": 1, "minibatches_per_step": 1, "group_size": 2, "num_steps": 3},
        rollout={"async_steps": 1, "drop_groups": ["truncated"], "max_rounds": 2},
    )
    client: Any = Client(*[rollout()] * 2)
    prompts: Any = Prompts()
    feed = EngineFeed(config, client, prompts)
    feed.collect(1, lambda: None)
    assert [request.step for request in client.requests] == [1, 2]
    assert drawn == [0, 1, 1, 2]  # its second round was not needed: step 2 begins with it
    assert feed.state_dict()["prompts"] == {"position": 1}
    feed.collect(2, lambda: None)
    assert [request.step for request in client.requests] == [1, 2, 3]
    client.requests.clear()
    client.rollouts = [rollout(weight_version=1)] * 2
    feed.collect(3, lambda: None)
    assert not client.requests and feed.state_dict()["prompts"] == {"position": 3}


def test_a_batch_is_not_passed_over_when_the_next_cannot_be_begun() -> None:
    """Its engines are lost for good: the run is saved, and another start trains on it."""
    position = iter(range(99))

    class Lost(Client):
        def submit(self, request: Any) -> None:
            super().submit(request)
            if request.step == 2:
                raise FleetLost("engine 0 died")

    config = run_config(
        train={"prompts_per_step": 1, "minibatches_per_step": 1, "group_size": 2, "num_steps": 3},
        rollout={"async_steps": 1},
    )
    client: Any = Lost(*[rollout()] * 2)
    prompts: Any = SimpleNamespace(
        state_dict=lambda: {"position": next(position)}, next_batch=lambda count, history: []
    )
    feed = EngineFeed(config, client, prompts)
    with pytest.raises(FleetLost):
        feed.collect(1, lambda: None)
    state = feed.state_dict()
    assert state["held"].keys() == {1} and state["prompts"] == {"position": 2}  # before step 2's
    assert any(name.startswith("1.") for name in state["rollouts"])


def test_a_batch_that_was_not_used_is_given_again() -> None:
    """There was no time for a pass over it."""
    config = run_config(
        train={"prompts_per_step": 1, "minibatches_per_step": 1, "group_size": 2, "num_steps": 3}
    )
    client: Any = Client(*[rollout()] * 2)
    prompts: Any = SimpleNamespace(state_dict=dict, next_batch=lambda count, history: [])
    feed = EngineFeed(config, client, prompts)
    given = feed.collect(1, lambda: None)
    feed.hand_back(1)
    assert feed.state_dict()["held"].keys() == {1}
    assert feed.collect(1, lambda: None) is given and len(client.requests) == 1


def test_the_saver_of_a_resumed_run_keeps_the_step_it_resumed_from(tmp_path: Path) -> None:
    """And drops what came after it, which is made again."""

    def one(reward: float) -> RolloutBatch:
        lengths = torch.ones(2, dtype=torch.int64)
        return make_batch(lengths, lengths.clone(), rewards=torch.full((2,), reward))

    file = str(tmp_path / "rollouts.safetensors")
    first = RolloutSaver(file)
    for step in (1, 2, 3):
        first.add(step, one(step))
    RolloutSaver(file, up_to_step=2).add(4, one(4))
    saved = SavedFeed(file)
    for step in (1, 2):
        assert saved.collect(step, lambda: None).rewards.tolist() == [step] * 2
    saved.collect(4, lambda: None)
    with pytest.raises(ValueError, match="step 3"):
        saved.collect(3, lambda: None)


def test_a_stretch_on_saved_rollouts_keeps_the_place_in_the_prompts(tmp_path: Path) -> None:
    """Engines, debug.train_only, engines: but for the batches that were taken in ahead."""
    lengths, file = torch.ones(2, dtype=torch.int64), str(tmp_path / "rollouts.safetensors")
    RolloutSaver(file).add(1, make_batch(lengths, lengths.clone()))
    by_engines = {
        "prompts": {"epoch": 1, "place": 3},
        "history": {"sums/0": [1, 2]},
        "held": {"7": {}},
        "samples": {"7": []},
        "rollouts": {"7.rewards": torch.ones(2)},
    }
    saved = SavedFeed(file)
    assert saved.state_dict() == {}
    saved.load_state_dict(by_engines)
    assert saved.state_dict() == {key: by_engines[key] for key in ("prompts", "history")}


def test_the_saver_of_a_new_run_keeps_what_stands_there(tmp_path: Path) -> None:
    """Another run's rollouts, as NAME.previous-N; a name that is free is left free."""
    lengths = torch.ones(2, dtype=torch.int64)
    batch, file = make_batch(lengths, lengths.clone()), tmp_path / "rollouts.safetensors"
    for number in (1, 2):
        RolloutSaver(str(file)).add(number, batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rollouts.safetensors",
        "rollouts.safetensors.previous-1",
    ]
    SavedFeed(str(tmp_path / "rollouts.safetensors.previous-1")).collect(1, lambda: None)
    SavedFeed(str(file)).collect(2, lambda: None)


def test_a_resumed_run_knows_its_best_evaluation() -> None:
    """Through JSON, as in run_state.json: only a better one moves it."""
    best = Best()
    assert best.step is None and best.state_dict() is None
    best.observe(3, 0.5)
    resumed = Best()
    resumed.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert resumed.step == 3
    resumed.observe(5, 0.4)
    resumed.observe(6, 0.5)
    assert resumed.step == 3
    resumed.observe(7, 0.6)
    assert resumed.step == 7
    resumed.observe(8, 0.1)
    assert resumed.state_dict() == {"asked": "", "found": (7, 0.6, 8, 0.1)}
    assert [resumed.value_at(step) for step in (8, 7, 6)] == [0.1, 0.6, None]
    resumed.marked = 6, 0.5
    resumed.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert resumed.state_dict() == {"asked": "", "found": (7, 0.6, 6, 0.5, 8, 0.1)}
    resumed.load_state_dict([3, 0.5])  # by the version before
    assert resumed.state_dict() == {"asked": "", "found": (3, 0.5, 3, 0.5)}
    resumed.load_state_dict(None)
    assert resumed.step is None and resumed.value_at(3) is None


def test_a_warm_start_is_at_the_models_own_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rollouts are sampled at; one tick of the schedule an optimizer step."""
    ticks: list[int] = []
    objectives: list[Any] = []

    def run_pass(policy: Any, minibatches: Any, objective: Any) -> PassResult:
        objectives.append(objective)
        return a_pass(1.0)

    monkeypatch.setattr(sft, "run_pass", run_pass)
    monkeypatch.setattr(sft, "batch_layout", lambda *_: None)
    policy: Any = SimpleNamespace(
        scheduler=SimpleNamespace(step=lambda increment: ticks.append(increment)),
        optimizer=SimpleNamespace(param_groups=[{"lr": 1e-3}]),
    )
    teacher = sft.Teacher(run_config(rollout={"temperature": 0.5}), policy)
    for step in (1, 2):
        teacher.learn([])
        assert ticks == [1] * step
    assert {objective.temperature for objective in objectives} == {1.0}


def a_pass(entropy: float) -> PassResult:
    one = MinibatchResult(
        loss=0.0, entropy=entropy, grad_norm=1.0, stats={}, maxima={}, num_tokens=3, skipped=False
    )
    return PassResult(minibatches=(one,))


def a_learner(ticks: list[int], **sections: Any) -> learner.Learner:
    """Its policy notes the ticks of its schedule."""
    policy: Any = SimpleNamespace(
        shards=SimpleNamespace(tensors=list),
        scheduler=SimpleNamespace(step=lambda increment: ticks.append(increment)),
        control=SimpleNamespace(agree=lambda **values: None, broadcast_json=lambda value: value),
    )
    objective: Any = SimpleNamespace(first_pass_is_old=True)
    return learner.Learner(run_config(**sections), policy, objective)


def test_the_gate_sees_the_slow_correction() -> None:
    found = a_learner([])
    found.observe([a_pass(0.25), a_pass(0.5), a_pass(0.75)])
    found.observe([a_pass(1.25), a_pass(1.5)])
    assert found.gate.state_dict()["window"] == [0.75, 1.5]


@pytest.mark.parametrize(
    ("entropies", "num_fast", "warns"),
    [
        ([1.0, 1.1, 1.0, 1.1], 3, True),  # z is 1, and nothing has happened
        ([1.0, 1.1, 1.0, 1.0], 3, False),  # it is open
        ([1.0, 1.1, 1.0, 1.9], 3, False),  # a jump
        ([1.0, 1.1, 1.0, 1.1], 0, False),  # it was closed before
    ],
)
def test_a_gate_that_noise_has_closed_is_told_of_once(
    entropies: list[float], num_fast: int, warns: bool
) -> None:
    found = a_learner([], sfpo={"entropy_window": 4, "entropy_zscore_threshold": 0.99})
    for entropy in entropies:
        found.observe([a_pass(entropy)])
    prepared: Any = SimpleNamespace(step=4, num_fast=num_fast)
    said = [*found.closed_on_noise(prepared), *found.closed_on_noise(prepared)]
    assert len(said) == warns
    assert all("train step 4: the entropy gate has closed at z = 1," in line for line in said)


def test_the_schedule_ticks_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever K is, at the first pass: a step that is given up before it has not ticked."""
    monkeypatch.setattr(learner, "cut", lambda config, policy, batch: [])
    monkeypatch.setattr(learner, "run_pass", lambda *_: ticks.append(0))
    ticks: list[int] = []
    found = a_learner(ticks)
    batch: Any = None
    for step in (1, 2):
        prepared = found.prepare(step, batch, Timers())
        assert prepared.num_fast == 3 and ticks == [1, 0, 0, 0, 0] * (step - 1)
        for _ in range(4):
            prepared.one_pass()
        assert ticks == [1, 0, 0, 0, 0] * step


@pytest.mark.parametrize("tensor_rank", [0, 1])
def test_tensor_ranks_do_not_count_a_kl_twice(tensor_rank: int) -> None:
    """They hold the same log-probs: the first one alone adds its own to the sum over ranks."""
    data = ragged(0)
    parts = cut(data, ObjectiveConfig(), data_size=1)
    for microbatch in (m for part in parts for m in part.microbatches):
        microbatch.ref_logprobs = data.old[microbatch.labels] - 0.5
    policy: Any = SimpleNamespace(
        layout=SimpleNamespace(tensor_rank=tensor_rank),
        control=SimpleNamespace(sum=lambda values: values),
    )
    found = rollout_kl(policy, parts, 16, KLConfig(coef=1.0, estimator="k1"))
    wanted = 0.5 * data.batch.response_lengths if tensor_rank == 0 else torch.zeros(16)
    torch.testing.assert_close(found, wanted.double())
