"""examples/megatron_loop uses public pieces only, and few lines of them.

What it computes is tested in tests/dist/test_megatron_loop.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_loop"
SOURCE = (EXAMPLE / "train.py").read_text(encoding="utf-8")
PUBLIC = {
    "sfpo_megatron": {"EntropyGate", "SlowSnapshot", "sfpo_step"},
    "sfpo_megatron.mcore.shards": {"MainParamShards"},
    "sfpo_megatron.mcore.cpu": {"install"},
}


def private_or_internal(source: str) -> list[str]:
    """What `source` takes from sfpo_megatron beyond PUBLIC, and every private name it uses."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            faults += [a.name for a in node.names if a.name.split(".")[0] == "sfpo_megatron"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfpo_megatron"):
            known = PUBLIC.get(node.module or "", set())
            faults += [f"{node.module}.{a.name}" for a in node.names if a.name not in known]
        name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
        if isinstance(name, str) and name.startswith("_") and name not in ("_", "__name__"):
            faults.append(name)
    return faults


def test_only_public_pieces() -> None:
    assert private_or_internal(SOURCE) == []
    text = "from sfpo_megatron.config import tree\nimport sfpo_megatron.sfpo\nx._slow = 1\n"
    assert private_or_internal(text) == [
        "sfpo_megatron.config.tree",
        "sfpo_megatron.sfpo",
        "_slow",
    ]


def test_at_most_fifteen_marked_lines() -> None:
    marked = [line for line in SOURCE.splitlines() if "  # SFPO" in line]
    assert 5 <= len(marked) <= 15
    assert all(line.split("  # SFPO")[0].strip() for line in marked)


def test_every_line_of_sfpo_is_marked() -> None:
    """No unmarked line names what the marked ones make: without them it is a plain loop."""
    names = ["sfpo_step", "SlowSnapshot", "EntropyGate", "MainParamShards", "snapshot", "gate."]
    for line in SOURCE.splitlines():
        if "  # SFPO" not in line:
            assert not any(name in line for name in names), line
