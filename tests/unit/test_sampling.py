"""What each sample is generated with: its seed, and the tokens that end it. No engine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfpo_megatron.rollout.sampling import call_seed, request_seed, stop_token_ids


def test_every_part_of_a_rollouts_name_is_in_its_seed() -> None:
    """Rollouts of two steps, prompts or samples share none; whatever process asks."""
    names = [
        (run, step, prompt, sample)
        for run in (0, 1)
        for step in (1, 2, 11)
        for prompt in ("a/1", "a/11")
        for sample in (0, 1, 12)
    ]
    seeds = [request_seed(*name) for name in names]
    assert len(set(seeds)) == len(names) and all(0 <= seed < 2**63 for seed in seeds)
    text = b'[7, 3, "a/1", 12]'
    wanted = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") // 2
    assert request_seed(7, 3, "a/1", 12) == wanted


def test_the_first_call_of_a_rollout_has_its_seed() -> None:
    seeds = [call_seed(5, number) for number in range(4)]
    assert seeds[0] == 5 and len(set(seeds)) == 4
    assert call_seed(6, 1) != seeds[1]


@pytest.mark.parametrize(
    ("tokenizer", "generation", "config", "wanted"),
    [
        (2, [7, 1], 9, (1, 2, 7)),  # config.json is asked only where both others are silent
        (2, None, 9, (2,)),
        (None, 7, 9, (7,)),
        (None, None, [9, 3], (3, 9)),
        (0, None, None, (0,)),
    ],
)
def test_every_end_that_the_directory_names(
    tmp_path: Path, tokenizer: int | None, generation: Any, config: Any, wanted: tuple[int, ...]
) -> None:
    named: Any = SimpleNamespace(eos_token_id=tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert stop_token_ids(tmp_path, named) == wanted or generation is not None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert stop_token_ids(tmp_path, named) == wanted


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    nameless: Any = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ValueError, match="no eos_token_id"):
        stop_token_ids(tmp_path, nameless)
