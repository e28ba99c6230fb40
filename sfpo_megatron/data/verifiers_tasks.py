"""Prompts that stand for the tasks of an environment of the verifiers package.

    data.train: [{source: "sfpo_megatron.data.verifiers_tasks:rows", args: {name: gsm8k}}]

The environment sends its own messages; the prompt says which task is played.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sfpo_megatron.config.tree import DataSource

INDEX = "verifiers_task"
"""The prompt's metadata that holds the place of its task in the environment."""
ANSWER = "known to the environment"
"""Every prompt's reference: the environment rewards, and no response is this one."""


def rows(source: DataSource, seed: int) -> Iterator[Mapping[str, Any]]:
    """The tasks in their order. `args`: the environment's `name`, and settings of its taskset."""
    for index, task in enumerate(_load(**source.args)):
        text = task.data.prompt_text or task.data.name or f"task {index}"
        yield {"prompt": text, "answer": ANSWER, INDEX: index}


def _load(name: str, **settings: Any) -> Iterable[Any]:
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

    return load_taskset(taskset_config_type(name).model_validate({**settings, "id": name}))
