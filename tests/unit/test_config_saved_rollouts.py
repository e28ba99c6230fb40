"""debug.save_rollouts replaces its file whole: never one that is somebody else's; of what
debug.train_only reads, `check` says what the run would stumble over.

Not exercised: a folder of another user's (root may write anywhere).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made.batches import make_batch
from made.configs import run_check, run_config, write_run
from safetensors.torch import load_file, save_file

from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules import saved_rollouts as rules
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.rules.saved_rollouts import (
    read_rollouts,
    saved_rollouts,
)
from sfpo_megatron.config.tree import DebugConfig
from sfpo_megatron.families.shape import model_shape, read_hf_config
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
    "names",
    [
        *(["model.embed_tokens.weight"], ["1.numbers", "lm_head.weight"], ["1.weight"], []),
        *(["01.numbers"], [f"{'9' * 5000}.numbers"]),
    ],
    ids=lambda names: " ".join(names)[:40],
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


# ---- debug.train_only --------------------------------------------------------------------------


def said(file: Path, **train: Any) -> list[str]:
    debug = {"train_only": str(file)}
    found = list(read_rollouts(run_config(output_dir=str(file.parent), debug=debug, train=train)))
    assert all(problem.level == "error_when_filling" for problem in found)
    return [f"{problem.key}: {problem.message}" for problem in found]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two train steps of six rollouts, the longest of 9 tokens."""
    saver = RolloutSaver(str(tmp_path / "rollouts.safetensors"))
    for step in (1, 2):
        saver.add(step, make_batch(torch.tensor([1, 2, 3, 4, 5, 6]), torch.full((6,), 3)))
    return tmp_path / "rollouts.safetensors"


def test_saved_rollouts_that_fit(saved: Path) -> None:
    for minibatches in (1, 2, 3, 6):
        sizes = {"prompts_per_step": 6, "minibatches_per_step": minibatches}
        assert said(saved, num_steps=2, max_tokens_per_microbatch=9, **sizes) == []
    assert said(saved, num_steps=1, microbatch_size=1, max_tokens_per_microbatch=8) == []


def test_saved_rollouts_end_before_the_run(saved: Path) -> None:
    (line,) = said(saved, num_steps=2**62)
    assert line == (
        f"train.num_steps: found {2**62} with 2 train steps in {str(saved)!r}, expected step 3 "
        "among them; set train.num_steps=2, or save more rollouts"
    )


def test_saved_rollouts_of_the_end_of_a_run(tmp_path: Path) -> None:
    """A run that was resumed and saved into another file; one that has begun goes on with it."""
    saver = RolloutSaver(str(tmp_path / "rollouts"))
    saver.add(3, make_batch(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)))
    (line,) = said(tmp_path / "rollouts", num_steps=3)
    assert "expected step 1 among them; name another file" in line
    (tmp_path / "run.json").touch()
    assert said(tmp_path / "rollouts", num_steps=3) == []
    assert "expected step 4" in said(tmp_path / "rollouts", num_steps=4)[0]


def test_saved_rollouts_that_cannot_be_cut(saved: Path) -> None:
    lines = said(saved, num_steps=1, minibatches_per_step=4, max_tokens_per_microbatch=8)
    assert lines == [
        "train.minibatches_per_step: found 4 with the 6 rollouts in train step 1 of "
        f"{str(saved)!r}, expected a divisor of their number; change it, or save rollouts by this "
        "config",
        "train.max_tokens_per_microbatch: found 8 with a rollout of 9 tokens in train step 1 of "
        f"{str(saved)!r}, expected room for each rollout; set it to 9 or more",
    ]


@pytest.mark.parametrize("content", [b"", b"my notes", b'{"prompt": "1 + 1 ="}\n'])
def test_what_is_no_file_of_rollouts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine").write_bytes(content)
    (line,) = said(tmp_path / "mine")
    assert line.startswith("debug.train_only: found ") and str(tmp_path / "mine") in line
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model")
    assert "a safetensors file that is no rollouts" in said(tmp_path / "model")[0]


def test_tokens_that_the_model_does_not_have(
    saved: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be an IndexError in the embedding, or on a GPU the end of its context."""
    monkeypatch.setattr(rules, "AT_ONCE", 4)  # a token of a later part, too
    monkeypatch.chdir(saved.parent)
    shape = model_shape(read_hf_config(str(model_dir())))
    write_run(debug={"train_only": str(saved)}, train={"num_steps": 2, "prompts_per_step": 6})
    assert not [line for line in run_check() if "token" in line and "train_only" in line]
    tensors = load_file(saved)
    for bad in (shape.vocab_size, -1):
        tensors["2.token_ids"][-1] = bad
        save_file(tensors, saved)
        with pytest.raises(ConfigError) as caught:
            run_check(for_training=True)
        assert str(caught.value).endswith(
            f"debug.train_only: found token {bad} in train step 2 of {str(saved)!r}, expected "
            f"tokens below {shape.vocab_size}, the rows of the embedding in model; save the "
            "rollouts with this model"
        )
    tensors["2.token_ids"][-1] = shape.vocab_size - 1
    save_file(tensors, saved)
    run_check()
