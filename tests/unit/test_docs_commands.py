"""Every command line of README, docs, examples and the Makefile parses, and its overrides are keys.

Not exercised: that the commands do what the text says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    *sorted(ROOT.glob("examples/*/*.yaml")),
]
COMMANDS = (
    "train",
    "sft",
    "eval",
    "check",
    "plan",
    "slurm",
    "score",
    "report",
    "doctor",
    "install",
    "demo",
)
BASE = """\
output_dir: r
model: {path: m}
data:
  train: [{source: reasoning_gym, task: chain_sum, size: 100}]
  eval: [{source: reasoning_gym, task: chain_sum, size: 100}]
"""
COMMAND = re.compile(
    r"\s*(?:sfpo-megatron|(?:torchrun|srun|python3?|\$).*-m sfpo_megatron|\$\(SFPO\)) +"
    rf"((?:{'|'.join(COMMANDS)})\b.*)"
)
END = re.compile(r"\s#| {6,}|`|;|\||>|\.\.\.| -- | - |, ")


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each command line in a code block or between backticks."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        block = fenced or line.startswith(("    ", "\t")) or page.suffix == ""
        candidates = [line] if block else re.findall(r"`([^`]*)`", line)
        for candidate in candidates:
            if found := COMMAND.match(candidate):
                words = re.sub(r"[][]", "", END.split(found[1])[0]).replace("key=value", "seed=1")
                words = re.sub(r"\$\(SEED\)|\bN$", "1", words)
                words = re.sub(r"\$\(\w+\)|\$\w+", "x", words)
                yield shlex.split(words)


FOUND = [(page, words) for page in PAGES for words in commands(page)]


def test_there_are_some() -> None:
    """Each command is written somewhere, most of them with options behind CONFIG."""
    assert {words[0] for _, words in FOUND} == set(COMMANDS)
    assert len(FOUND) > 40
    assert any("--nodes" in words and "--time" in words for _, words in FOUND)


@pytest.mark.parametrize(
    ("page", "words"), FOUND, ids=[f"{p.parent.name}-{p.stem}-{' '.join(w)}"[:70] for p, w in FOUND]
)
def test_it_parses(page: Path, words: list[str], tmp_path: Path) -> None:
    if words[0] != "doctor" and len(words) == 1:
        return  # the name of a command alone
    arguments = cli.parse(words)
    if hasattr(arguments, "overrides"):
        (tmp_path / "run.yaml").write_text(BASE)
        load_config(tmp_path / "run.yaml", arguments.overrides)
