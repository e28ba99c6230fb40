"""debug.save_rollouts replaces its file whole: never one that is somebody else's.

Not exercised: a folder of another user's (root may write anywhere).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made.batches import make_batch
from made.configs import run_config
from safetensors.torch import save_file

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.rules.saved_rollouts import saved_rollouts
from sfpo_megatron.config.tree import DebugConfig
from sfpo_megatron.run.saved_rollouts import RolloutSaver


def problems(file: Path, train_only: Path | None = None) -> list[Problem]:
    read = None if train_only is None else str(train_only)
    debug = DebugConfig(save_rollouts=str(file), train_only=read)
    return list(saved_rollouts(replace(run_config(), debug=debug)))


def test_nothing_there_and_rollouts_are_fine(tmp_path: Path) -> None:
    assert problems(tmp_path / "new" / "rollouts.safetensors") == []
    assert not (tmp_path / "new").exists()
    saver = RolloutSaver(str(tmp_path / "rollouts.safetensors"))
    for step in (3, 12):
        saver.add(
            step, make_batch(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
        )
    assert problems(tmp_path / "rollouts.safetensors") == []


@pytest.mark.parametrize(
    "content",
    [b"", b"my notes", b'{"prompt": "1 + 1 =", "answer": "2"}\n', b"version https://git-lfs"],
)
def test_files_of_others(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine"
    file.write_bytes(content)
    (problem,) = problems(file)
    assert problem.level == "error_when_writing" and problem.key == "debug.save_rollouts"
    assert problem.found == f"a file that is no rollouts at {str(file)!r}"
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "names", [["model.embed_tokens.weight"], ["1.numbers", "lm_head.weight"], ["1.weight"], []]
)
def test_safetensors_of_others(tmp_path: Path, names: list[str]) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    (problem,) = problems(tmp_path / "model.safetensors")
    assert problem.found.startswith("a safetensors file that is no rollouts")


def test_places_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    (tmp_path / "file").touch()
    for file, found in (
        (tmp_path, "a folder, or no regular file"),
        (tmp_path / "link", "a link to nothing"),
        (tmp_path / "file" / "rollouts", f"{str(tmp_path / 'file')!r}, where no file can be made"),
    ):
        (problem,) = problems(file)
        assert problem.found.startswith(found)


def test_the_file_that_is_read(tmp_path: Path) -> None:
    """It would have the first step alone after the first step."""
    (tmp_path / "link").symlink_to(tmp_path / "rollouts")
    (tmp_path / "rollouts").touch()
    for file in (tmp_path / "rollouts", tmp_path / "link"):
        (problem,) = problems(file, tmp_path / "rollouts")
        assert problem.found.endswith("which is debug.train_only")
