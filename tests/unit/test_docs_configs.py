"""Every block of YAML in the docs is a config, or a part of one, that `check` takes.

Not exercised: that a run of it does what the page says; configs in other blocks than ```yaml.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError, load_config

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/qwen3-4b-base/model"
BASE = {
    "output_dir": "run",
    "model": {"path": str(MODEL)},
    "data": {"train": [{"source": "reasoning_gym", "task": "chain_sum", "size": 1000}]},
}
"""What a part is completed with."""


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


FOUND = [
    (page, tree)
    for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")])
    for tree in map(yaml.safe_load, blocks(page, "yaml"))
]


def completed(tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """`tree` with what `part` says in place of its own."""
    for key, value in part.items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict)
        tree[key] = completed(tree[key], value) if both else value
    return tree


def check(tree: dict[str, Any], folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(completed(copy.deepcopy(BASE), tree)))
    check_config(load_config(file), file=str(file), on_cpu=False)


@pytest.mark.parametrize(("page", "tree"), FOUND, ids=[page.stem for page, _ in FOUND])
def test_check_takes_it(
    page: Path, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules that it names have the Python of the page, of which nothing is run."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\bmy_\w+(?=:\w)", str(tree)):
        (tmp_path / f"{name}.py").write_text("\n".join(blocks(page, "python")))
    check(tree, tmp_path)


def test_there_are_some() -> None:
    assert len(FOUND) > 8


def test_a_part_that_is_refused_is_found(tmp_path: Path) -> None:
    """Rows of a file, and no reward that can judge them: the default needs reasoning-gym's."""
    with pytest.raises(ConfigError, match=r"reward\.function"):
        check({"data": {"train": [{"source": "jsonl", "path": "train.jsonl"}]}}, tmp_path)
