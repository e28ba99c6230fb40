"""reasoning-gym's own `score_answer` for the task that made the prompt.

The answer is what stands in the last `<answer>...</answer>` if there is one (reasoning-gym's
convention), else the whole response. Partial credit of a task is kept: the reward is its score.
"""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

from sfpo_megatron.rewards import Problem
from sfpo_megatron.rewards.tagged import tagged
from sfpo_megatron.rewards.thinking import STRIP, visible
from sfpo_megatron.rewards.wire import Explanation


def score(response: str, prompt: Problem, *, thinking: str = STRIP) -> float:
    """The task's score of the response, in [0, 1]."""
    metadata = prompt.metadata
    if "entry" not in metadata:
        raise ValueError(
            "metadata: found no reasoning_gym entry, expected a prompt of source reasoning_gym; "
            "for jsonl prompts set reward.function to exact_match or last_number"
        )
    answer = tagged_answer(visible(response, thinking))
    dataset = _dataset(metadata["task"], json.dumps(metadata["args"], sort_keys=True))
    return min(1.0, max(0.0, float(dataset.score_answer(answer, metadata["entry"]))))


def explain(response: str, prompt: Problem, *, thinking: str = STRIP) -> Explanation:
    """How it was read."""
    found = tagged_answer(visible(response, thinking))
    return {"found": found, "read": [], "reference": prompt.answer, "reference_read": []}


def tagged_answer(response: str) -> str:
    """The part of the response that is the answer."""
    found = tagged(response)
    return response.strip() if found is None else found


@functools.lru_cache(maxsize=64)
def _dataset(task: str, args: str) -> Any:
    """The task's class holds the verifier; some read their settings when they score."""
    return package().create_dataset(task, seed=0, size=1, **json.loads(args))


def warm_up() -> None:
    """Import the package, seconds long, before a scoring process says that it is ready."""
    package()


def package() -> Any:
    """reasoning-gym itself; ImportError without it."""
    with warnings.catch_warnings():  # a dependency of reasoning-gym compares with `is`
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym
