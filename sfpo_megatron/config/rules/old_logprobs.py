"""`objective.old_logprobs: generator`: where the generator's log-probs can stand for the trainer's.

The ratio is then new / generator's probability, the whole importance ratio. It is right where both
are of the same distribution; elsewhere the clip is around another policy than the one that is
updated. Only the first minibatch has the trainer's own, from its first forward.
"""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig

_INSTEAD = "or set objective.old_logprobs: trainer"


def old_logprobs(config: RunConfig) -> Iterator[Problem]:
    objective, rollout = config.objective, config.rollout
    if objective.old_logprobs == "trainer":
        return
    if rollout.top_p < 1:
        yield _refused(
            f"rollout.top_p {rollout.top_p:g}",
            "top_p 1",
            "the engine's log-probs are renormalized over the nucleus: all ratios would be too "
            f"small; set rollout.top_p: 1, {_INSTEAD}",
        )
    if rollout.async_steps:
        yield _refused(
            f"rollout.async_steps {rollout.async_steps}",
            "rollouts by the weights that are updated",
            "they are by weights one update old: the clip would hold the policy near those; set "
            f"rollout.async_steps: 0, {_INSTEAD}",
        )
    if config.debug.train_only:
        yield _refused(
            "debug.train_only",
            "rollouts by the weights that are updated",
            f"saved rollouts may be by any; generate them, {_INSTEAD}",
        )
    if objective.kl.in_reward:
        yield _refused(
            "objective.kl.where: reward",
            "a penalty in the loss",
            f"the reward's is of the trainer's own log-probs; set kl.where: loss, {_INSTEAD}",
        )
    yield from _precision(config)


def _precision(config: RunConfig) -> Iterator[Problem]:
    """Whether engine and trainer agree, or the ratio is meant to hold their difference."""
    objective, rollout = config.objective, config.rollout
    sampling = objective.importance_sampling
    if not sampling.is_on and (rollout.quantization or config.model.dtype != "float32"):
        engine = f"rollout.quantization {rollout.quantization}"
        yield _refused(
            engine if rollout.quantization else f"model.dtype {config.model.dtype}",
            "float32, where engine and trainer agree, or objective.importance_sampling",
            "rounding, which differs between the two, would enter every ratio and use up the clip; "
            f"set objective.importance_sampling.weight: token, {_INSTEAD}",
        )
    needs = [
        f"{name} {value}"
        for name, value in (("weight", sampling.weight), ("reject", sampling.reject))
        if value == "sequence" or (name == "reject" and value != "none")
    ]
    if needs:
        yield _refused(
            f"objective.importance_sampling.{' and '.join(needs)}",
            "weight: token, reject: none",
            "a rejection and a weight of a whole response need the trainer's log-probs; the ratio "
            f"holds token weights alone; change them, {_INSTEAD}",
        )


def _refused(found: str, expected: str, fix: str) -> Problem:
    return Problem("objective.old_logprobs", f"generator with {found}", expected, fix)
