"""Held-out accuracy of the policy that the engines hold, and the best one of a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import source_of
from sfpo_megatron.rewards.components import part_means
from sfpo_megatron.types import Prompt

if TYPE_CHECKING:
    from sfpo_megatron.rollout.client import RolloutClient


class HeldOutRollout(NamedTuple):
    """One scored rollout of an evaluation, as far as its means go."""

    source: str
    correct: bool
    reward: float
    num_tokens: int
    truncated: bool
    parts: Mapping[str, float]


class Evaluations(TypedDict):
    """What a checkpoint has of `Best`."""

    asked: str
    """`Best.asked`; empty where it is not known, or nothing was evaluated since."""
    found: Sequence[float]
    """Train step and value of the best, of the marked one where there is one, of the newest."""


class Best:
    """The best evaluation of the run so far, and the newest; part of every checkpoint."""

    def __init__(self, asked: str = "") -> None:
        """`asked`: `Evaluation.asked`; accuracies of anything else compare with none of these."""
        self.asked = asked
        self.has_forgotten = False
        """Whether the run had evaluations, of something else, before it was continued."""
        self._found: tuple[int, float] | None = None
        self._newest: tuple[int, float] | None = None
        self.marked: tuple[int, float] | None = None
        """(train step, value) of the checkpoint that is marked as the best: one that was evaluated
        after it had been written does not say so itself."""

    @property
    def step(self) -> int | None:
        """The train step after which it was taken."""
        return self._found[0] if self._found is not None else None

    @property
    def value(self) -> float | None:
        """What was found there, the higher the better: the accuracy, of several sources their
        average."""
        return self._found[1] if self._found is not None else None

    def value_at(self, step: int) -> float | None:
        """What was found after train step `step`, if it is one of those that are remembered."""
        remembered = (self._newest, self._found, self.marked)
        return next((one[1] for one in remembered if one is not None and one[0] == step), None)

    def observe(self, step: int, value: float) -> None:
        """Keep the evaluation after train step `step` if it is better than all before; one that is
        not finite, as of weights that have diverged, is none."""
        if not math.isfinite(value):
            return
        self._newest = step, value
        if self._found is None or value > self._found[1]:
            self._found = step, value

    def state_dict(self) -> Evaluations | None:
        """What a checkpoint keeps; None before the first evaluation."""
        if self._found is None or self._newest is None:
            return None
        found = *self._found, *(self.marked or ()), *self._newest
        return {"asked": self.asked, "found": found}

    def load_state_dict(self, state: Evaluations | list[float] | None) -> None:
        """Continue at a saved state; versions before saved numbers alone, of the best or without a
        marked one."""
        then: Evaluations = {"asked": "", "found": ()}
        if isinstance(state, list):
            then["found"] = state
        elif state is not None:
            then = state
        self.has_forgotten = bool(self.asked and then["asked"] not in ("", self.asked))
        self.asked = self.asked or then["asked"]
        found = () if self.has_forgotten else then["found"]
        pairs = [(int(found[at]), found[at + 1]) for at in range(0, len(found), 2)]
        self._found = pairs[0] if pairs else None
        self._newest = pairs[-1] if pairs else None
        self.marked = pairs[1] if pairs[2:] else None


class Evaluation(Protocol):
    """Rank 0's end of an evaluation."""

    @property
    def asked(self) -> str:
        """`print_of` what is evaluated; empty where nothing is."""

    def __call__(self, step: int, refit: Callable[[], None]) -> dict[str, float]:
        """Metrics of the weights after train step `step`; `refit` sends restarted engines the
        current weights."""


class NoEvaluation:
    """Another rank than 0, or a run without engines."""

    asked = ""

    def __call__(self, step: int, refit: Callable[[], None]) -> dict[str, float]:
        """Never called: `Engines.evaluate` returns before, or rank 0 does the work."""
        raise AssertionError("nothing to evaluate here")


class EngineEvaluation:
    """Held-out prompts through the engines."""

    def __init__(self, config: RunConfig, client: RolloutClient, prompts: Sequence[Prompt]) -> None:
        self._config = config
        self._client = client
        self._prompts = prompts
        self.asked = print_of(config, prompts)

    def __call__(self, step: int, refit: Callable[[], None]) -> dict[str, float]:
        """avg@n over the prompts at `eval.temperature`, and of each source of data.eval where there
        are several; metrics under `eval/`."""
        from sfpo_megatron.rollout.sampling import eval_request

        request = eval_request(self._config, f"eval/{step}", self._prompts, step=step)
        self._client.submit(request)
        rollouts = [
            HeldOutRollout(
                source=source_of(rollout.prompt_id),
                correct=rollout.correct,
                reward=rollout.reward,
                num_tokens=rollout.num_generated,
                truncated=not rollout.finished,
                parts=rollout.parts,
            )
            for rollout in self._client.collect(request.id, refit)
        ]
        return {"step": step, **eval_metrics(rollouts)}


def print_of(config: RunConfig, prompts: Sequence[Prompt]) -> str:
    """One value for what an accuracy hangs on besides the weights: the held-out prompts, their
    rewards, and how they are sampled. Neither names of files nor `eval.n` are part of it. Empty
    without prompts."""
    if not prompts:
        return ""
    settings = [
        *(config.eval.temperature, config.eval.top_p, config.eval_response_tokens),
        *(config.rollout.environment, config.rollout.environment_args, config.reward.thinking),
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for prompt in prompts:
        rewards = [(one.name, one.weight) for one in config.reward.summands(prompt.reward)]
        digest.update(repr((prompt.token_ids, prompt.answer, rewards)).encode())
    return digest.hexdigest()[:16]


def is_due(config: RunConfig, step: int) -> bool:
    """Whether the weights after train step `step` are evaluated."""
    every = config.eval.every
    return step == config.train.steps or (every > 0 and step % every == 0)


def eval_metrics(rollouts: Sequence[HeldOutRollout]) -> dict[str, float]:
    """The means over all rollouts of an evaluation, and of each source where there are several."""
    num = len(rollouts)
    sources: dict[str, list[float]] = {}
    for one in rollouts:
        sources.setdefault(one.source, []).append(float(one.correct))
    of_each = {f"eval/accuracy/{name}": sum(v) / len(v) for name, v in sources.items()}
    if len(of_each) > 1:  # what the best checkpoint is chosen by: each source counts alike
        of_each["eval/average"] = sum(of_each.values()) / len(of_each)
    return {
        "eval/accuracy": sum(one.correct for one in rollouts) / num,
        "eval/reward_mean": sum(one.reward for one in rollouts) / num,
        "eval/response_tokens_mean": sum(one.num_tokens for one in rollouts) / num,
        "eval/truncated": sum(one.truncated for one in rollouts) / num,
        "eval/num_rollouts": num,
        **(of_each if len(of_each) > 1 else {}),
        **part_means(rollouts, "eval/reward/"),
    }
