"""Rows of a reasoning-gym generator, seeded, with the entry its verifier needs as metadata.

reasoning-gym seeds problem i with `seed + i`, so neighbouring seeds give almost the same problems:
the seeds used here are hashes (`derived_seed`), far apart for each run seed, split and source.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row
from sfpo_megatron.rewards.reasoning_gym import package
from sfpo_megatron.rewards.wire import packed, unpacked

UNSTABLE = (
    *("isomorphic_strings", "knight_swap", "list_functions"),
    *("polynomial_multiplication", "ransom_note", "word_ladder"),
)
"""Tasks of reasoning-gym 0.1.25 whose questions or answers follow Python's hash seed, which is
another in each process, or (list_functions) the unseeded generator of the module `random`: a
resumed run would have other data."""
_HASH_SEED = "PYTHONHASHSEED"


def derived_seed(*parts: str | int) -> int:
    """A 31-bit seed of its own for each tuple of `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """`source.size` problems of `source.task`, numbered from 0."""
    assert source.task is not None and source.size is not None  # DataSource refuses it
    dataset = build_dataset(source.task, source.args, seed=seed, size=source.size)
    entries: Iterable[dict[str, Any]]
    if source.task in UNSTABLE:
        entries = _made_elsewhere(source.task, source.args, seed=seed, size=source.size)
    else:
        entries = (dataset[index] for index in range(source.size))
    for index, entry in enumerate(entries):
        where = f"reasoning_gym {source.task} entry {index}"
        yield _refused(entry, where) or Row(
            id=str(index),
            where=where,
            question=str(entry["question"]),
            answer="" if entry["answer"] is None else str(entry["answer"]),
            metadata={"task": source.task, "args": dict(source.args), "entry": entry},
        )


def _made_elsewhere(
    task: str, args: Mapping[str, Any], *, seed: int, size: int
) -> Iterator[dict[str, Any]]:
    """The entries, made by a process whose hash seed is 0 and whose `random` is seeded."""
    request = json.dumps({"task": task, "args": dict(args), "seed": seed, "size": size})
    program = "from sfpo_megatron.data import reasoning_gym; reasoning_gym.print_entries()"
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    made = subprocess.run(
        [sys.executable, "-c", program],
        input=request.encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, _HASH_SEED: "0", "PYTHONPATH": path},
        check=True,
    )
    return map(unpacked, made.stdout.splitlines())


def print_entries() -> None:
    """A line of JSON for each entry of the data set that stdin asks for."""
    request = json.load(sys.stdin)
    size, lines = request["size"], []
    dataset = build_dataset(request["task"], request["args"], seed=request["seed"], size=size)
    for index in range(size):
        random.seed(derived_seed("module", request["seed"], index))
        lines.append(json.dumps(packed(dataset[index])))
    print("\n".join(lines))


def build_dataset(task: str, args: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The generator, or a `SourceError` that names the task or the setting that is wrong."""
    factory = _load_factory()
    if task not in factory.DATASETS:
        near = difflib.get_close_matches(task, factory.DATASETS, n=4, cutoff=0.4)
        raise SourceError(
            "task",
            found=shorten(task),
            expected="one of reasoning-gym's tasks",
            fix=f"did you mean {' or '.join(near)}?" if near else "see reasoning-gym's gallery",
        )
    config_class = factory.DATASETS[task][1]
    settings = {f.name for f in dataclasses.fields(config_class)} - {"seed", "size"}
    for unknown in sorted(set(args) - settings):
        near = difflib.get_close_matches(unknown, settings, n=1, cutoff=0.4)
        raise SourceError(
            f"args.{unknown}",
            found=f"{unknown} = {shorten(args[unknown])}",
            expected=f"a setting of {task}: {', '.join(sorted(settings))}",
            fix=f"did you mean {near[0]}?" if near else "remove it",
        )
    try:
        return factory.create_dataset(task, seed=seed, size=size, **args)
    except (AssertionError, TypeError, ValueError) as error:  # its validate() asserts
        raise SourceError(
            "args",
            found=shorten(dict(args)),
            expected=f"settings that {task} takes ({error})",
            fix="correct the setting that the message names",
        ) from error


def _load_factory() -> Any:
    try:
        return package().factory
    except ImportError as error:
        raise SourceError(
            "source",
            found=f"reasoning_gym, which does not import ({error})",
            expected="the package reasoning-gym",
            fix="pip install reasoning-gym",
        ) from error


def _refused(entry: Mapping[str, Any], where: str) -> DataError | None:
    """Why an entry cannot be scored, if it cannot: the verifier runs in another process."""
    try:
        json.dumps(packed(entry))
    except (TypeError, ValueError, RecursionError) as error:
        return DataError(
            where,
            found=f"an entry that is not JSON ({error})",
            expected="numbers, strings, lists and objects only",
            fix="choose another task: this one's verifier needs Python objects",
            kind="that JSON cannot hold",
        )
    return None
