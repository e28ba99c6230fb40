"""A run that collapses: what counts, when it stops, and what never stops it.

Not exercised: a model whose loss is not finite (tests/dist/test_skipped_step.py skips steps).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made.batches import make_batch
from made.configs import run_config

from sfpo_megatron import sft, trainer
from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.training import SFTConfig
from sfpo_megatron.config.tree import TrainConfig
from sfpo_megatron.launcher import rank
from sfpo_megatron.mcore.passes import MinibatchResult, PassResult
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.collapse import Collapse, RunCollapsed
from sfpo_megatron.run.learner import Learner
from sfpo_megatron.types import RolloutBatch

NAN, INF = math.nan, math.inf


def a_batch(*rewards: float) -> RolloutBatch:
    lengths = torch.ones(len(rewards), dtype=torch.int64)
    return make_batch(lengths, lengths.clone(), rewards=torch.tensor(rewards))


def passes(
    *, loss: float = 0.1, entropy: float = 1.0, skipped: str = "--/--", num_tokens: int = 3
) -> list[PassResult]:
    """`skipped`: a letter a minibatch of each pass, `x` where the optimizer step was skipped."""
    return [
        PassResult(
            minibatches=tuple(
                MinibatchResult(
                    loss=loss,
                    entropy=entropy,
                    grad_norm=1.0,
                    stats={},
                    maxima={},
                    num_tokens=num_tokens,
                    skipped=letter == "x",
                )
                for letter in one
            )
        )
        for one in skipped.split("/")
    ]


class Steps:
    """A run, step by step."""

    def __init__(self, **train: Any) -> None:
        self.train = TrainConfig(**train)
        self.collapse, self.step = Collapse(self.train), 0

    def start_again(self) -> None:
        """Continue from a checkpoint, as another process."""
        state = json.loads(json.dumps(self.collapse.state_dict(), allow_nan=False))
        self.collapse = Collapse(self.train)
        self.collapse.load_state_dict(state)

    def __call__(
        self,
        results: list[PassResult],
        batch: RolloutBatch | None = None,
        *,
        times: int = 1,
        loss_scale: float = 1.0,
    ) -> str | None:
        """What is said after the last; nothing may be said before."""
        said = None
        for _ in range(times):
            assert said is None
            self.step += 1
            said = self.collapse.observe(
                self.step, batch or a_batch(0, 1), results, loss_scale=loss_scale
            )
        return said


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite(loss: float) -> None:
    steps = Steps()
    assert steps(passes(), times=5) is None
    said = steps(passes(loss=loss), times=10)
    assert said is not None and said.startswith("train step 15: the last 10 train steps")
    assert f"loss {loss}" in said and "train.stop_after_skipped_steps" in said


def test_optimizer_steps_that_are_all_skipped() -> None:
    said = Steps(stop_after_skipped_steps=3)(passes(skipped="xx/xx"), times=3)
    assert said is not None and "4 of 4 optimizer steps skipped" in said


@pytest.mark.parametrize("skipped", ["x-/--", "xx/x-", "xx/--"])
def test_one_optimizer_step_that_is_made_is_enough(skipped: str) -> None:
    assert Steps()(passes(skipped=skipped), times=200) is None


def test_in_a_row() -> None:
    steps = Steps()
    for _ in range(5):
        assert steps(passes(loss=NAN), times=9) is None
        assert steps(passes()) is None


def test_float16_looks_for_its_loss_scale() -> None:
    """From 2^32 on, with one optimizer step a train step: Megatron halves it at each overflow. At
    its minimum, where it falls no more, skipped steps count."""
    steps = Steps()
    for power in range(32, -1, -1):
        assert steps(passes(skipped="x"), loss_scale=2.0**power) is None
    assert steps(passes(skipped="x"), times=10) is not None


def test_float16_with_a_loss_that_is_not_finite_counts() -> None:
    steps = Steps(stop_after_skipped_steps=4)
    said = [steps(passes(loss=NAN, skipped="x"), loss_scale=2.0**p) for p in (9, 8, 7, 6)]
    assert said[:3] == [None] * 3 and said[3] is not None


def test_rewards_and_entropy_at_zero() -> None:
    steps = Steps()
    dead = passes(entropy=1e-4)
    assert steps(dead, a_batch(0, 0, 0, 0), times=99) is None
    assert steps(dead, a_batch(0, 0, 0.1, 0)) is None
    said = steps(dead, a_batch(0, 0, 0, 0), times=100)
    assert said is not None and said.startswith("train step 200: in the last 100 train steps")
    assert "train.stop_after_zero_reward_steps" in said


@pytest.mark.parametrize(
    ("rewards", "entropy"),
    [
        ((1, 1, 1, 1), 0.0),  # solved
        ((0.5, 0.5), 0.0),
        ((0, 0, 0, 0), 0.5),  # hard, but it looks around
        ((-1, -1), 0.0),
        ((1, 0), 0.0),
    ],
)
def test_healthy_runs_go_on(rewards: tuple[float, ...], entropy: float) -> None:
    assert Steps()(passes(entropy=entropy), a_batch(*rewards), times=300) is None


def test_solved_where_0_is_the_best_reward() -> None:
    steps = Steps()
    assert steps(passes(), a_batch(-1, 0), times=5) is None
    assert steps(passes(entropy=0.0), a_batch(0, 0), times=300) is None


@pytest.mark.parametrize("reached", ["skipped", "zero"])
def test_a_start_goes_on_counting(reached: str) -> None:
    """Jobs that are shorter than the limit reach it together; once reached, it counts anew."""
    steps = Steps(stop_after_skipped_steps=10, stop_after_zero_reward_steps=10)
    dead = {"skipped": passes(loss=NAN), "zero": passes(entropy=0.0)}[reached]
    batch = a_batch(0, 0)
    for _ in range(2):
        for _ in range(3):
            assert steps(dead, batch, times=3) is None
            steps.start_again()
        said = steps(dead, batch)
        assert said is not None and "the last 10 train steps" in said
        steps.start_again()


def test_a_start_knows_the_lowest_reward() -> None:
    """An environment with -1 and 0, which is solved before the job ends."""
    steps = Steps()
    assert steps(passes(), a_batch(-1, 0), times=5) is None
    steps.start_again()
    assert steps(passes(entropy=0.0), a_batch(0, 0), times=300) is None


def test_a_start_knows_the_loss_scale() -> None:
    steps = Steps(stop_after_skipped_steps=1)
    assert steps(passes(), loss_scale=8.0) is None
    steps.start_again()
    assert steps(passes(skipped="x"), loss_scale=4.0) is None


def test_a_checkpoint_of_the_version_before_has_no_counts() -> None:
    steps = Steps()
    steps.start_again()  # before the first step, too
    steps.collapse.load_state_dict(None)
    assert steps(passes(loss=NAN), times=10) is not None


def test_the_entropy_of_a_collapse_can_be_set() -> None:
    steps = Steps(stop_after_zero_reward_steps=3, collapsed_entropy=0.2)
    assert steps(passes(entropy=0.3), a_batch(0, 0), times=9) is None
    said = steps(passes(entropy=0.1), a_batch(0, 0), times=3)
    assert said is not None and "the entropy below 0.2 nats (now 0.1)" in said
    with pytest.raises(FieldError, match="collapsed_entropy"):
        TrainConfig(collapsed_entropy=-1.0)


@pytest.mark.parametrize("every", [0, 5])
def test_a_warm_start_ends_too(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rewards are none: neither 0 nor an entropy near 0 says anything."""
    monkeypatch.setattr(sft, "batch_layout", lambda *_: None)
    config = run_config(checkpoint={"every": every}, sft={"stop_after_skipped_steps": 3})
    policy: Any = SimpleNamespace()
    teacher, saved = sft.Teacher(config, policy), list[int]()

    def look(step: int, loss: float, num_skipped: int = 0) -> None:
        metrics = {"loss": loss, "num_skipped_steps": num_skipped, "entropy": 0.0}
        teacher.check(step, metrics, save=saved.append)

    for step in range(1, 201):
        look(step, 0.5)
    look(201, NAN)
    look(202, 0.5, num_skipped=1)
    says = "step is saved" if every else r"not saved \(checkpoint.every is 0"
    with pytest.raises(RunCollapsed, match=rf"^step 203: .*sft\.stop_after_sk.* sft\.lr.*{says}"):
        look(203, INF)
    assert saved == [203]
    with pytest.raises(FieldError, match="stop_after_skipped_steps"):
        SFTConfig(stop_after_skipped_steps=0)


def test_null_is_never() -> None:
    steps = Steps(stop_after_skipped_steps=None, stop_after_zero_reward_steps=None)
    assert steps(passes(loss=NAN, entropy=0.0), a_batch(0, 0), times=300) is None
    with pytest.raises(FieldError, match="stop_after_skipped_steps"):
        TrainConfig(stop_after_skipped_steps=0)


def test_a_batch_that_is_masked_out_says_nothing() -> None:
    steps = Steps(stop_after_skipped_steps=2)
    assert steps(passes(loss=NAN)) is None
    assert steps(passes(num_tokens=0, skipped="xx"), times=50) is None
    assert steps(passes(loss=NAN)) is not None


def test_the_gate_survives_an_entropy_that_is_not_finite() -> None:
    """Such a step is counted here; in the gate's window it would make every later z-score nan, and
    no checkpoint could hold it."""
    policy: Any = SimpleNamespace(shards=SimpleNamespace(tensors=list))
    objective: Any = SimpleNamespace()
    learner = Learner(run_config(), policy, objective)
    for entropy in (0.5, NAN, INF, 0.25):
        learner.observe(passes(entropy=entropy))
    learner.observe(passes(num_tokens=0))
    assert learner.gate.state_dict()["window"] == [0.5, 0.25]


def look(learner: Learner, prepared: Any, results: Any, saved: list[int]) -> None:
    """After a step whose rollouts are of older weights, so that log-probs are not compared."""
    learner.check(prepared, results, {}, prompt_ids=(), warn=print, save=saved.append)


@pytest.mark.parametrize("every", [0, 5])
def test_it_ends_after_a_save(every: int) -> None:
    config = run_config()
    config = replace(
        config,
        train=replace(config.train, stop_after_skipped_steps=1),
        checkpoint=replace(config.checkpoint, every=every),
    )
    policy: Any = SimpleNamespace(shards=SimpleNamespace(tensors=list))
    objective: Any = SimpleNamespace()
    prepared: Any = SimpleNamespace(step=8, batch=a_batch(0, 1), minibatches=[])
    saved: list[int] = []
    learner = Learner(config, policy, objective)
    look(learner, prepared, passes(), saved)
    says = "step is saved" if every else r"not saved \(checkpoint.every is 0"
    with pytest.raises(RunCollapsed, match=f"^train step 8: .*{says}"):
        look(learner, prepared, passes(loss=NAN), saved)
    assert saved == [8]


def test_float16_asks_rank_0_for_the_loss_scale() -> None:
    config = run_config()
    config = replace(
        config,
        model=replace(config.model, dtype="float16"),
        train=replace(config.train, stop_after_skipped_steps=2),
    )
    scales = iter([4.0, 2.0, 1.0, 1.0, 1.0])
    policy: Any = SimpleNamespace(
        shards=SimpleNamespace(tensors=list),
        optimizer=SimpleNamespace(get_loss_scale=lambda: torch.tensor([64.0])),
        control=SimpleNamespace(broadcast_json=lambda own: next(scales)),
    )
    objective: Any = SimpleNamespace()
    prepared: Any = SimpleNamespace(step=8, batch=a_batch(0, 1), minibatches=[])
    learner = Learner(config, policy, objective)
    for _ in range(4):
        look(learner, prepared, passes(skipped="x"), [])
    with pytest.raises(RunCollapsed):
        look(learner, prepared, passes(skipped="x"), [])


def test_the_loop_looks_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step's own results, after its metrics are logged; what is saved is that step."""
    monkeypatch.setattr(trainer, "sfpo_step", lambda *_, **__: ["results"])
    config = run_config()
    config = replace(config, train=replace(config.train, num_steps=5))
    did: list[Any] = []

    def note(name: str, result: Any = None) -> Any:
        return lambda *_, **__: did.append(name) or result

    def check(
        prepared: Any, results: Any, metrics: Any, *, prompt_ids: Any, warn: Any, save: Any
    ) -> None:
        assert prompt_ids == ("a", "b")
        did.append((prepared.step, results))
        if prepared.step == 2:
            save(prepared.step)
            raise RunCollapsed("now")

    prepared = {step: SimpleNamespace(step=step, num_fast=1, one_pass=None) for step in (1, 2)}
    learner: Any = SimpleNamespace(
        prepare=lambda step, *_: prepared[step],
        snapshot=None,
        observe=lambda results: None,
        metrics=lambda *_: {},
        check=check,
    )
    nothing = ("evaluate", "collect", "to_trainer", "take_weights", "details")
    engines: Any = SimpleNamespace(
        metrics={},
        is_over=lambda step: False,
        evaluate_if_due=lambda step: False,
        **{name: lambda *_, **__: None for name in nothing},
    )
    checkpoints: Any = SimpleNamespace(
        resume=lambda: 0,
        evaluated=lambda step: did.append(f"evaluated {step}"),
        guarded=lambda one_pass, **_: one_pass,
        times={},
        save_now=lambda step: did.append(f"saved {step}"),
        after_step=note("after"),
    )
    opened: Any = SimpleNamespace(
        config=config,
        ends=SimpleNamespace(feed=SimpleNamespace(prompt_ids=("a", "b"))),
        log=note("logged"),
        show=note("shown"),
        progress=note("said"),
        important=note("said"),
    )
    with pytest.raises(RunCollapsed):
        trainer.train(opened, learner, engines, checkpoints)
    first, second = (1, ["results"]), (2, ["results"])
    shown = ["logged", "shown"]
    assert did == ["evaluated 0", *shown, first, "after", *shown, second, "saved 2"]


@pytest.mark.parametrize(("error", "mark"), [(RunCollapsed, "1\nfinal\n"), (ValueError, "1\n")])
def test_a_job_is_told_not_to_come_back(
    error: type[Exception], mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through logs/rank_N.exit, which the job script reads."""
    monkeypatch.setattr(rank, "install_signal_handlers", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "0")

    def run() -> bool:
        raise error("train step 3: ...")

    directory = RunDirectory.of(tmp_path)
    assert rank.run_rank(run, directory=directory, launched=False) == 1
    assert directory.exit_file(0).read_text() == mark
    assert f"{error.__name__}: train step 3" in directory.error_file(0).read_text()
