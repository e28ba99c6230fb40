"""Docstrings are sentences on their own (PEP 257): none continues the name above it.

"Number of trainer GPUs.", not "Of the trainer." below `num_gpus`. Held for modules, classes,
functions and the texts below fields. Not exercised: whether the rest of a docstring reads well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("sfpo_megatron", "tests", "tools", "benchmarks", "examples")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
CONTINUES = re.compile(r"(Of|As|Whose|Where|See)\b")

# Files that still break the rule. The list may only become shorter.
BEING_MENDED = {
    "sfpo_megatron/batching.py",
    "sfpo_megatron/config/load.py",
    "sfpo_megatron/config/objective.py",
    "sfpo_megatron/config/rollout.py",
    "sfpo_megatron/config/rules/transports.py",
    "sfpo_megatron/config/tree.py",
    "sfpo_megatron/host/addresses.py",
    "sfpo_megatron/host/stopping.py",
    "sfpo_megatron/launcher/rendezvous.py",
    "sfpo_megatron/objectives/objective.py",
    "sfpo_megatron/resharding/checksums.py",
    "sfpo_megatron/resharding/filling.py",
    "sfpo_megatron/resharding/lockstep.py",
    "sfpo_megatron/resharding/plan.py",
    "sfpo_megatron/resharding/refit.py",
    "sfpo_megatron/resharding/source.py",
    "sfpo_megatron/resharding/streams.py",
    "sfpo_megatron/resharding/transports/shm.py",
    "sfpo_megatron/resharding/transports/stages.py",
    "sfpo_megatron/resharding/transports/stock.py",
    "sfpo_megatron/resharding/transports/tensor_names.py",
    "sfpo_megatron/rollout/controller.py",
    "sfpo_megatron/rollout/engine_handle.py",
    "sfpo_megatron/rollout/fleet.py",
    "sfpo_megatron/rollout/lifeline.py",
    "sfpo_megatron/rollout/placement.py",
    "sfpo_megatron/rollout/reports.py",
    "sfpo_megatron/rollout/updates.py",
    "sfpo_megatron/run/engines.py",
    "sfpo_megatron/run/evaluation.py",
    "sfpo_megatron/run/feed.py",
    "sfpo_megatron/run/opening.py",
    "sfpo_megatron/run/turns.py",
    "sfpo_megatron/slurm/render.py",
    "sfpo_megatron/types.py",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings(code: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands alone as a statement: docstrings of modules, classes
    and functions, and of the fields above them."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text.strip()


def fragments(path: Path) -> list[str]:
    """Docstrings of a file that are no sentences on their own."""
    found = docstrings(path.read_text(encoding="utf-8"))
    return [f"{path.name}:{line}: {text[:60]}" for line, text in found if CONTINUES.match(text)]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_docstrings_are_sentences(path: Path) -> None:
    if name(path) in BEING_MENDED:
        assert fragments(path), f"mended: take {name(path)} out of BEING_MENDED"
    else:
        assert not fragments(path)


def test_only_files_that_exist_are_being_mended() -> None:
    assert not BEING_MENDED - set(map(name, FILES))


def test_the_check_finds_fragments(tmp_path: Path) -> None:
    """Each place of a docstring counts; a word that only begins alike does not."""
    file = tmp_path / "x.py"
    file.write_text(
        '"""Of a module."""\n'
        "class A:\n"
        '    """Whose class."""\n'
        "    size: int\n"
        '    """As a field."""\n'
        "    async def f(self):\n"
        '        """\n        Where it is."""\n'
        "def g():\n"
        '    """Offsets, Assets and Seen things."""\n'
    )
    assert sorted(fragments(file)) == [
        "x.py:1: Of a module.",
        "x.py:3: Whose class.",
        "x.py:5: As a field.",
        "x.py:7: Where it is.",
    ]
