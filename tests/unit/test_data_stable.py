"""A task of reasoning-gym gives the same problems in every process: its rows are compared with a
checkpoint's at each resume.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.reasoning_gym import UNSTABLE, rows
from sfpo_megatron.data.rows import Row

PROGRAM = """
import hashlib, json, sys
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.reasoning_gym import rows
found = {}
for task in json.load(sys.stdin):
    source = DataSource(source="reasoning_gym", task=task, size=6)
    try:
        text = repr([(row.question, row.answer) for row in rows(source, 12345)])
    except ValueError as error:  # entries that are not JSON
        text = str(error).partition("(")[0]
    found[task] = hashlib.sha256(text.encode()).hexdigest()
print()  # some tasks print dots
print(json.dumps(found))
"""


def digests(tasks: list[str], hash_seed: str) -> dict[str, str]:
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(tasks),
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(made.stdout.splitlines()[-1])
    return found


def test_a_task_that_follows_the_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made by a process whose hash seed is 0; what that makes with reasoning-gym 0.1.25 was
    taken down."""
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    source = DataSource(source="reasoning_gym", task="isomorphic_strings", size=2)
    found = [row for row in rows(source, 12345) if isinstance(row, Row)]
    assert [row.question.split()[-2:] for row in found] == [
        ["ldvgndvg", "oacibagi"],
        ["bcepkpuiv", "fnvfjptys"],
    ]
    assert [(row.id, row.answer, row.metadata["task"]) for row in found] == [
        ("0", "False", "isomorphic_strings"),
        ("1", "False", "isomorphic_strings"),
    ]


def test_a_task_that_follows_an_unseeded_generator() -> None:
    """Also where the hash seed of the run is 0 already."""
    first, second = digests(["list_functions"], "1"), digests(["list_functions"], "0")
    assert first == second


@pytest.mark.full
def test_every_task() -> None:
    from reasoning_gym.factory import DATASETS

    assert set(UNSTABLE) <= set(DATASETS)
    first, second = digests(sorted(DATASETS), "1"), digests(sorted(DATASETS), "2")
    assert len(first) == len(DATASETS)
    assert not [task for task in DATASETS if first[task] != second[task]]
