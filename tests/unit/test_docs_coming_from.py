"""docs/coming-from.md: our side of each row is a key, and the refusal of a peer's name agrees.

Not exercised: whether peers still have these names.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sfpo_megatron.config import reference
from sfpo_megatron.config.load import ConfigError, load_config

PAGE = Path(__file__).parents[2] / "docs/coming-from.md"
BASE = """\
output_dir: r
model: {path: m}
data: {train: [{source: reasoning_gym, task: chain_sum, size: 100}]}
"""
KEYS = {key.name: key.type for section in reference.sections() for key in section.keys}
FREE = tuple(f"{name}." for name, kind in KEYS.items() if kind == "section of any keys")
OURS_TOO = {"seed", "reward.num_workers", "--rollout.temperature"}
"""Names that are keys here too."""
OTHERWISE = {
    "data.train.dataset_name",  # into our list of sources
}


def rows() -> list[tuple[str, str, str]]:
    """(trainer, its name, our key) of every row."""
    found, trainer = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            trainer = line[3:]
        elif match := re.match(r"\| `([^`]+)` \| `([^`]+)` \|", line):
            found.append((trainer, match[1], match[2]))
        else:
            assert not line.startswith("| `"), f"a row of another form: {line}"
    return found


ROWS = rows()


def test_there_are_some_of_each() -> None:
    trainers = [trainer for trainer, _, _ in ROWS]
    assert set(trainers) == {"verl", "slime", "OpenRLHF", "NeMo-RL", "TRL"}
    assert min(map(trainers.count, trainers)) > 35
    names = [(trainer, name) for trainer, name, _ in ROWS]
    assert len(set(names)) == len(names)


def test_our_side_is_a_key() -> None:
    known = {*KEYS, "megatron"}
    assert not [row for row in ROWS if row[2] not in known and not row[2].startswith(FREE)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_refusal_says_the_same(tmp_path: Path, row: tuple[str, str, str]) -> None:
    """The row's key is suggested, or its last part where the sections are the same."""
    _, name, key = row
    if name in OURS_TOO or name in OTHERWISE:
        return
    (tmp_path / "run.yaml").write_text(BASE)
    typed = name.removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", [f"{typed}=1"])
    assert re.search(rf"\b({key}|{key.rpartition('.')[2]})( or |\?)", caught.value.fix)
