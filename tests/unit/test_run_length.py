"""num_steps or num_epochs, and a run that ends at its target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron import trainer
from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.training import SFTConfig, TrainConfig
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.run.ends import MainEnds
from sfpo_megatron.run.engines import Engines
from sfpo_megatron.run.held_out import Best
from sfpo_megatron.run.length import sft_length, train_length
from sfpo_megatron.run.opening import other_ends


class Rank:
    """A control group's answer to one rank: what rank 0 has said."""

    def __init__(self, said: Any) -> None:
        self._said = said

    def broadcast_json(self, value: Any = None) -> Any:
        return self._said


@pytest.mark.parametrize("section", [TrainConfig, SFTConfig])
def test_exactly_one(section: type[TrainConfig | SFTConfig]) -> None:
    assert (section().num_steps, section().num_epochs) == (100, None)
    assert (section(num_steps=7).num_steps, section(num_epochs=2).num_steps) == (7, None)
    assert section(num_epochs=2).with_steps(9).steps == 9
    with pytest.raises(FieldError, match="num_epochs: found 2, expected null with num_steps 100"):
        section(num_steps=100, num_epochs=2)
    for wrong in ({"num_epochs": 0}, {"num_steps": 0}, {"num_epochs": -1}):
        with pytest.raises(FieldError, match="found"):
            section(**wrong)
    with pytest.raises(RuntimeError, match="once the data has been read"):
        _ = section(num_epochs=2).steps


@pytest.mark.parametrize(
    ("prompts", "oversample", "epochs", "steps"),
    [(64, 1.0, 1, 2), (64, 1.0, 3, 6), (95, 1.0, 2, 4), (32, 1.0, 1, 1), (64, 1.5, 3, 3)],
)
def test_epochs_of_train_are_whole_batches(
    prompts: int, oversample: float, epochs: int, steps: int
) -> None:
    """A batch never straddles two epochs (data/cursor.py); every rank takes rank 0's count."""
    rollout = {"oversample": oversample, "drop_groups": ["zero_variance"]}
    config = run_config(
        train={"num_epochs": epochs, "prompts_per_step": 32},
        rollout=rollout if oversample > 1 else {},
    )
    for own in (prompts, 0):
        rank: Any = Rank(prompts)
        found = train_length(config, rank, own).train
        assert (found.steps, found.num_epochs) == (steps, None)


def test_too_few_prompts_for_a_batch() -> None:
    config = run_config(train={"num_epochs": 5, "prompts_per_step": 32})
    rank: Any = Rank(31)
    with pytest.raises(DataError, match="found 31 prompts, expected at least one batch of 32"):
        train_length(config, rank, 31)


@pytest.mark.parametrize(("examples", "epochs", "steps"), [(10, 1, 3), (10, 2, 5), (12, 1, 3)])
def test_epochs_of_sft_are_all_examples(examples: int, epochs: int, steps: int) -> None:
    config = run_config(sft={"num_epochs": epochs, "examples_per_step": 4})
    rank: Any = Rank(examples)
    assert sft_length(config, rank, examples).sft.steps == steps


def test_a_schedule_that_does_not_fit_the_epochs() -> None:
    rank: Any = Rank(8)
    sft = {"num_epochs": 1, "examples_per_step": 4, "lr_warmup_steps": 2}
    with pytest.raises(DataError, match=r"sft.num_epochs: found 1, which comes to 2 steps"):
        sft_length(run_config(sft=sft), rank, 8)


# ---- eval.stop_at -------------------------------------------------------------------------------


def an_engines(config: RunConfig, best: Best, said: list[str], reached: bool | None) -> Engines:
    """On rank 0, or where `reached` is what rank 0 says."""
    anything: Any = SimpleNamespace(important=said.append)
    ends: Any = other_ends() if reached is not None else _main(anything, best)
    control: Any = Rank(reached)
    if reached is None:
        control = SimpleNamespace(broadcast_json=lambda value: value)
    return Engines(config, ends, control, anything, anything)


def _main(tracker: Any, best: Best) -> MainEnds:
    other = other_ends()
    return MainEnds(
        stop=other.stop,
        tracker=tracker,
        fleet=other.fleet,
        feed=other.feed,
        saver=other.saver,
        evaluation=other.evaluation,
        best=best,
    )


def test_the_target_is_reached_once_an_evaluation_has() -> None:
    config, best, said = run_config(eval={"stop_at": 0.5}), Best(), []
    engines = an_engines(config, best, said, None)
    assert not engines.is_over(0)  # nothing has been evaluated
    best.observe(10, 0.49)
    assert not engines.is_over(10) and said == []
    best.observe(20, 0.5)
    best.observe(30, 0.3)  # reached all the same: a run that continues does not go on
    assert engines.is_over(30)
    (line,) = said
    assert "0.500 after step 20 has reached eval.stop_at=0.5" in line
    assert not an_engines(run_config(), best, said, None).is_over(30)
    for told in (True, False):
        assert an_engines(config, Best(), said, told).is_over(30) is told
    last = config.train.steps
    assert an_engines(config, Best(), said, False).is_over(last) and last > 30


class FakeRun:
    """The loop's four sides: evaluations by step, the rest notes what is asked of it."""

    def __init__(self, config: RunConfig, accuracies: dict[int, float], resumed: int = 0) -> None:
        self.config, self.resumed, self.trained, self.saved = config, resumed, [], []
        self.best, self.text = Best(), []
        for step, accuracy in accuracies.items():
            if step <= resumed and resumed:
                self.best.observe(step, accuracy)

        def evaluate(*, step: int) -> None:
            self.best.observe(step, accuracies.get(step, 0.0))

        target = an_engines(config, self.best, self.text, None)
        target.evaluate = evaluate  # type: ignore[method-assign]
        self.engines: Any = SimpleNamespace(
            to_trainer=lambda: None,
            collect=lambda step: self.trained.append(step),
            take_weights=lambda step, timers: None,
            evaluate=target.evaluate,
            lacks_evaluation=target.lacks_evaluation,
            evaluate_if_due=target.evaluate_if_due,
            is_over=target.is_over,
            details=lambda step, batch: None,
            metrics={},
        )
        self.checkpoints: Any = SimpleNamespace(
            resume=lambda: self.resumed,
            evaluated=lambda step: None,
            guarded=lambda one_pass, **_: one_pass,
            after_step=self._after_step,
            save_now=lambda step: None,
            times={},
        )
        prepared = SimpleNamespace(num_fast=0, one_pass=lambda: None)
        self.learner: Any = SimpleNamespace(
            prepare=lambda step, batch, timers: prepared,
            snapshot=None,
            observe=lambda results: None,
            metrics=lambda *_: {},
            check=lambda *_, **__: None,
        )
        self.opened: Any = SimpleNamespace(
            config=config,
            log=lambda metrics: None,
            show=lambda details: None,
            progress=self.text.append,
            important=self.text.append,
            ends=_main(SimpleNamespace(), self.best),
        )

    def _after_step(self, step: int, *, is_last: bool = False) -> bool:
        self.saved.append((step, is_last))
        return False

    def train(self) -> bool:
        return trainer.train(self.opened, self.learner, self.engines, self.checkpoints)


def test_the_loop_ends_at_its_target() -> None:
    """Saved as a last step is, and not as a run that was stopped: it exports, and exits with 0."""
    settings = {"train": {"num_steps": 9}, "sfpo": {"num_fast_passes": 0}}
    config = run_config(eval={"stop_at": 0.8, "every": 2}, **settings)
    run = FakeRun(config, {0: 0.1, 2: 0.5, 4: 0.8, 6: 0.9})
    assert not run.train()
    assert run.trained == [1, 2, 3, 4]
    assert run.saved == [(1, False), (2, False), (3, False), (4, True)]
    again = FakeRun(config, {2: 0.5, 4: 0.8}, resumed=4)  # the same command once more
    assert not again.train() and (again.trained, again.saved) == ([], [(4, True)])
    at_once = FakeRun(config, {0: 0.85})
    assert not at_once.train() and (at_once.trained, at_once.saved) == ([], [(0, True)])
    never = FakeRun(config, {2: 0.79})
    assert not never.train() and never.trained == list(range(1, 10))
    assert never.saved[-1] == (9, True) and [last for _, last in never.saved].count(True) == 1
    free = FakeRun(run_config(eval={"every": 2}, **settings), {2: 1.0})
    assert not free.train() and len(free.trained) == 9
