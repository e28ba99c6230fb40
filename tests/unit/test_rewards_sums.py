"""Weighted sums, and a reward for each source: config, check, and the scores that come of them.

Not exercised: a whole run (tests/e2e).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import write_run
from own_rewards import Own, own, problem, rewards

from sfpo_megatron import cli
from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.load import ConfigError, dump_config, load_config
from sfpo_megatron.config.reward import RewardConfig, WeightedReward
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.rows import Row
from sfpo_megatron.data.sources import source_rows
from sfpo_megatron.rewards.components import part_means
from sfpo_megatron.rewards.pool import ScoringPool, VerifierError

__all__ = ["own"]  # the fixture

BOTH = (WeightedReward(name="last_number"), WeightedReward(name="format", weight=0.1))
RESPONSES = [r"\boxed{42}", "42", r"\boxed{7}", "", r"<think>\boxed{42}"]


# ---- sums ---------------------------------------------------------------------------------------


def test_a_sum_is_the_weighted_scores_and_the_first_decides() -> None:
    with ScoringPool(RewardConfig(function=BOTH, num_workers=2, timeout_s=20.0)) as pool:
        found = pool.score([(problem(), response) for response in RESPONSES])
    alone = []
    for function in ("last_number", "format"):
        with ScoringPool(RewardConfig(function=function, timeout_s=20.0)) as pool:
            alone.append(rewards(pool.score([(problem(), response) for response in RESPONSES])))
    assert alone == [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]
    assert rewards(found) == [1.0 * a + 0.1 * b for a, b in zip(*alone, strict=True)]
    assert [one.correct for one in found] == [a == 1 for a in alone[0]]
    assert [dict(one.parts) for one in found] == [
        {"last_number": a, "format": b} for a, b in zip(*alone, strict=True)
    ]
    assert part_means(found, "reward/") == {"reward/last_number": 0.4, "reward/format": 0.4}


@pytest.mark.parametrize("first", ["last_number", "format"])
def test_correct_is_the_firsts_whatever_the_sum(first: str) -> None:
    second = {"last_number": "format", "format": "last_number"}[first]
    choice = (WeightedReward(name=first, weight=0.0), WeightedReward(name=second, weight=-2.5))
    with ScoringPool(RewardConfig(function=choice, timeout_s=20.0)) as pool:
        number, form = pool.score([(problem(), "42"), (problem(), r"\boxed{7}")])
    assert [number.correct, form.correct] == [first == "last_number", first == "format"]
    assert {number.reward, form.reward} == {0.0, -2.5}


def test_a_sum_is_exact() -> None:
    """So that equal scores are equal rewards, whatever their order."""
    weights = {"last_number": 0.1, "format": 0.2, "exact_match": 0.3}
    choice = tuple(WeightedReward(name=name, weight=weight) for name, weight in weights.items())
    with ScoringPool(RewardConfig(function=choice, timeout_s=20.0)) as pool:
        (one,) = pool.score([(problem(r"\boxed{42}"), r"\boxed{42}")])
    assert one.reward == 0.6 == math.fsum(weights.values()) != 0.1 + 0.2 + 0.3


def test_own_functions_in_a_sum(own: Own) -> None:
    """Lists for one, single responses for another; their parts stand below their names; one that a
    response kills leaves the others' scores."""
    pool = own(
        """
import os
def many(responses, prompts): return [{"reward": 0.5, "size": len(r)} for r in responses]
def one(response, prompt):
    if response == "die": os._exit(1)
    return 1
""",
        function=(
            WeightedReward(name="exact_match"),
            WeightedReward(name="mine:many", weight=2.0, batched=True),
            WeightedReward(name="mine:one", weight=0.25),
        ),
    )
    found = pool.score([(problem(), text) for text in ("42", "die", "x")])
    assert rewards(found) == [2.25, 1.0, 1.25]
    assert found[0].parts == {
        "exact_match": 1.0, "mine.many": 0.5, "mine.many/size": 2.0, "mine.one": 1.0
    }  # fmt: skip
    assert found[1].parts["mine.one"] == 0.0 and not found[1].timed_out


def test_a_function_of_a_sum_that_is_broken_is_named(own: Own) -> None:
    pool = own(
        "def score(response, prompt): return None",
        function=(WeightedReward(name="exact_match"), WeightedReward(name="mine:score")),
    )
    with pytest.raises(VerifierError, match=r"prompt p/0: reward\.function mine:score returned no"):
        pool.score([(problem(), "42")])


def test_a_response_that_takes_too_long_for_one_is_timed_out(own: Own) -> None:
    pool = own(
        "import time\ndef score(response, prompt): time.sleep(60)",
        function=(WeightedReward(name="exact_match"), WeightedReward(name="mine:score")),
        timeout_s=0.5,
    )
    (found,) = pool.score([(problem(), "42")])
    assert found.timed_out and found.reward == 1.0 and found.correct


# ---- a reward a source --------------------------------------------------------------------------


def test_each_response_is_scored_by_the_reward_of_its_source(own: Own) -> None:
    pool = ScoringPool(
        RewardConfig(function="exact_match", num_workers=2, timeout_s=20.0),
        rewards=("last_number", BOTH, None),
    )
    with pool:
        items = [(problem(name=f"p/{i}"), r"it is \boxed{42}") for i in range(600)]
        choices = [("last_number", BOTH, None)[i % 3] for i in range(600)]
        found = pool.score(items, choices)
    assert rewards(found) == [1.0, 1.1, 0.0] * 200
    assert [bool(one.parts) for one in found] == [False, True, False] * 200


def test_a_row_carries_its_sources_reward(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "?", "answer": "1"}\n')
    for choice in (None, "math", BOTH):
        source = DataSource(source="jsonl", path=str(tmp_path / "p.jsonl"), reward=choice)
        (row,) = source_rows(source, seed=0, key="k", name="n")
        assert isinstance(row, Row) and row.reward == choice


def test_a_function_that_no_source_uses_is_not_loaded() -> None:
    config = RewardConfig(function="nowhere:score", timeout_s=20.0)
    with ScoringPool(config, rewards=("exact_match",)) as pool:
        assert rewards(pool.score([(problem(), "42")], ["exact_match"])) == [1.0]
    with pytest.raises(VerifierError, match="nowhere does not import"):
        ScoringPool(config, rewards=("exact_match", None))


# ---- config and check ---------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "?", "answer": "1"}\n')
    (tmp_path / "mine.py").write_text("def score(response, prompt): return 1\n")

    def write(reward: Any, *sources: Any, held_out: Any = None) -> Path:
        def entry(choice: Any) -> dict[str, Any]:
            return {"source": "jsonl", "path": "p.jsonl", "reward": choice}

        return write_run(
            tmp_path,
            output_dir=f"{tmp_path}/run",
            model={"path": "owner/name"},
            data={
                "train": [entry(choice) for choice in sources or (None,)],
                "eval": [entry(held_out)],
            },
            reward=reward,
        )

    return write


def test_a_config_with_both_is_read_and_written(config_file: Callable[..., Path]) -> None:
    sums = [{"name": "math", "weight": 1}, {"name": "mine:score", "weight": 1e-1}]
    path = config_file({"function": sums}, "last_number", sums, held_out="math")
    config = load_config(path, ["reward.function.1.weight=0.5"])
    assert config.reward.function == (
        WeightedReward(name="math"),
        WeightedReward(name="mine:score", weight=0.5),
    )
    assert config.rewards[0] == "last_number" and config.rewards[2] == "math"
    assert config.rewards[1] == (
        config.reward.function[0],
        WeightedReward(name="mine:score", weight=0.1),
    )
    (path.parent / "again.yaml").write_text(dump_config(config))
    assert load_config(path.parent / "again.yaml") == config


@pytest.mark.parametrize(
    ("reward", "sources", "key", "found"),
    [
        ({"function": []}, (), "reward.function", "expected at least one function"),
        ({"function": [{"name": "maths"}]}, (), "reward.function.0.name", "found 'maths'"),
        ({"function": [{"weight": 1}]}, (), "reward.function.0.name", "found nothing"),
        ({"function": ["math"]}, (), "reward.function.0", "expected a section"),
        ({"function": {"name": "math"}}, (), "reward.function", "a string or a list"),
        ({"function": None}, (), "reward.function", "found null"),
        ({"function": [{"name": "math", "weight": "x"}]}, (), "reward.function.0.weight", "'x'"),
        ({"function": [{"name": "math"}] * 2}, (), "reward.function", "each function once"),
        ({"function": [{"name": "math", "batched": True}]}, (), "reward.function.0.batched", "Tru"),
        ({"function": [{"name": "math"}], "batched": True}, (), "reward.batched", "a list of func"),
        ({}, ("maths",), "data.train.0.reward", "found 'maths', expected one of reasoning_gym"),
        ({}, ("math", [{"name": "no"}]), "data.train.1.reward.0.name", "found 'no'"),
        ({}, ("math", 5), "data.train.1.reward", "a string or a list"),
    ],
)
def test_what_is_no_reward(
    config_file: Callable[..., Path], reward: Any, sources: Any, key: str, found: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file(reward, *sources))
    assert f": {key}: found " in str(caught.value) and found in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "sources", "held_out", "error"),
    [
        ({"function": "math"}, (None, "nowhere:score"), None, "data.train.1.reward: found 'now"),
        ({"function": "math"}, (), "mine:other", "data.eval.0.reward: found nothing that can be"),
        ({"function": "math"}, ([{"name": "math"}, {"name": "mine:x"}],), None,
         "data.train.0.reward.1.name: found nothing that can be called 'x'"),
        ({"function": [{"name": "nowhere:score"}]}, (), None, "reward.function.0.name: found 'now"),
        ({"function": "math"}, ("http",), None, "reward.http.url: found null"),
        ({"function": "math"}, ("reasoning_gym",), None, "data.train.0.reward: found reasoni"),
        ({"function": "reasoning_gym"}, ("math",), None, "reward.function: found reasoning_gym"),
    ],
)  # fmt: skip
def test_check_finds_all_of_them(
    config_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    reward: Any, sources: Any, held_out: Any, error: str,
) -> None:  # fmt: skip
    path = config_file(reward, *sources, held_out=held_out)
    assert cli.main(["check", str(path)]) == 2
    assert f"{path.name}: {error}" in capsys.readouterr().err


def test_check_takes_two_kinds_of_sources(
    config_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """reward.function is the unused default then."""
    path = config_file({}, "math", "mine:score", held_out="last_number")
    assert cli.main(["check", str(path)]) == 0
    assert "reward" not in capsys.readouterr().err


def test_check_warns_of_a_server_that_is_not_asked_or_too_patient(
    config_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server = {"url": "http://127.0.0.1:1/", "retries": 30}
    path = config_file({"function": "math", "http": server})
    assert cli.main(["check", str(path)]) == 0
    assert "reward.http.url: found 'http://127.0.0.1:1/', and no reward" in capsys.readouterr().err
    path = config_file({"function": "http", "http": server})
    assert cli.main(["check", str(path)]) == 0
    assert "found 30 of 60 s each, with their pauses 2,641 s" in capsys.readouterr().err
    assert cli.main(["check", str(path), f"reward.http.retries={2**62}"]) == 0
    assert f"reward.http.retries: found {2**62} of 60 s each" in capsys.readouterr().err


def test_the_sections_alone_are_checked() -> None:
    with pytest.raises(FieldError, match="each function once"):
        RewardConfig(function=BOTH + BOTH)
    with pytest.raises(FieldError, match="each function once"):
        DataSource(source="jsonl", path="x", reward=BOTH + BOTH)


def test_a_config_stays_free_of_torch() -> None:
    code = (
        "import sys, sfpo_megatron.config.reward, sfpo_megatron.rewards.pool\n"
        "import json; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(json.loads(done.stdout))
