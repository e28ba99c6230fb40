"""The numbers of a report against what they are made of: axes, gate, arms, costs of a target."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from made.report_runs import ROLLOUTS, write_report_run

from sfpo_megatron.config.tree import SFPOConfig
from sfpo_megatron.gate import EntropyGate
from sfpo_megatron.outputs.report.arms import drift_profile, grouped, over_seeds
from sfpo_megatron.outputs.report.curves import Curves, curves_of, thinned
from sfpo_megatron.outputs.report.reading import Run, read_run
from sfpo_megatron.outputs.report.target import chosen_target, ratio, reached
from sfpo_megatron.outputs.report.zscores import gate_scores


def run_of(path: Path, lines: list[dict[str, Any]], **config: Any) -> Run:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return read_run(path, path.name)


# ---- one run --------------------------------------------------------------------------------


def test_axes_are_sums_up_to_the_row(tmp_path: Path) -> None:
    """Passes and seconds as each step had them; an evaluation has those of the step before it."""
    times = {"time/step_s": 2.0}
    lines = [
        {"step": 0, "eval/accuracy": 0.1},
        {"step": 1, "num_rollouts": 8, "loss": 0.0, "num_passes": 4, **times},
        {"step": 2, "num_rollouts": 16, "loss": 0.0, "num_passes": 4, **times},
        {"step": 2, "eval/accuracy": 0.5},
        {"step": 3, "num_rollouts": 24, "loss": 0.0, "num_passes": 1, "time/step_s": 0.5},
        {"step": 3, "eval/accuracy": 0.6},
    ]
    curves = curves_of(run_of(tmp_path / "run", lines))
    assert curves.train["rollouts"] == [8, 16, 24]
    assert curves.train["passes"] == [4, 8, 9]
    assert curves.train["seconds"] == [2.0, 4.0, 4.5]
    assert curves.evals["step"] == [0, 2, 3]
    assert curves.evals["passes"] == [0, 8, 9]
    assert curves.evals["seconds"] == [0, 4.0, 4.5]
    assert curves.evals["accuracy"] == [0.1, 0.5, 0.6]


@pytest.mark.parametrize("window", [3, 7, 30])
def test_where_the_entropy_is_the_bound_the_gate_closes(window: int) -> None:
    rng = random.Random(window)
    entropies = [1.0 + rng.gauss(0, 0.1) for _ in range(60)]
    scores = gate_scores(entropies, EntropyGate(window=window))
    assert scores.z[: window - 1] == [None] * (window - 1)
    judged = zip(entropies, scores.z, scores.bound, strict=True)
    closed = [e >= b for e, z, b in judged if z is not None and b is not None]
    assert closed == [z >= 1.0 for z in scores.z if z is not None] and any(closed)


def test_the_curves_are_of_the_runs_own_gate(tmp_path: Path) -> None:
    """Every setting of the gate that bears on z or the bound; a step without entropy has none."""
    lines: list[dict[str, Any]] = [
        {"step": step, "num_rollouts": 8, "loss": 0.0, "entropy": entropy}
        for step, entropy in enumerate([9.0, 2.0, 2.2, None, 2.6, 2.7, 2.0], start=1)
    ]
    sfpo = {
        "entropy_window": 2,
        "entropy_zscore_threshold": 9.0,
        "entropy_relative_threshold": 0.1,
        "entropy_patience": 2,
        "entropy_window_excludes_newest": True,
        "entropy_warmup_steps": 1,
    }
    train = curves_of(run_of(tmp_path / "run", lines, sfpo=sfpo)).train
    assert train["z"] == [None] * 4 + [pytest.approx(5.0), pytest.approx(6.0), pytest.approx(-13)]
    assert train["bound"] == [None] * 4 + [pytest.approx(2.31)] * 2 + [pytest.approx(2.65 * 1.1)]
    assert "low_bound" not in train


@pytest.mark.parametrize("relative", [None, 0.1])
def test_a_gate_without_a_zscore_closes_by_the_share_alone(
    tmp_path: Path, relative: float | None
) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "num_rollouts": 8, "loss": 0.0, "entropy": entropy}
        for step, entropy in enumerate([2.0, 2.2, 2.6], start=1)
    ]
    sfpo = {
        "entropy_window": 2,
        "entropy_zscore_threshold": None,
        "entropy_relative_threshold": relative,
    }
    train = curves_of(run_of(tmp_path / "run", lines, sfpo=sfpo)).train
    assert train["z"] == [None, pytest.approx(1.0), pytest.approx(1.0)]
    bounds = [None, pytest.approx(2.1 * 1.1), pytest.approx(2.4 * 1.1)]
    assert train.get("bound") == (bounds if relative else None)


@pytest.mark.parametrize("relative", [None, 0.02])
def test_a_two_sided_gate_closes_below_a_bound_too(tmp_path: Path, relative: float | None) -> None:
    """The paper's Algorithm 1: a fall counts, and with patience the window waits for one."""
    entropies = [2.0, 2.01, 2.02, 1.9, 1.8, 1.99, 2.2, 2.0, 1.7]
    lines: list[dict[str, Any]] = [
        {"step": step, "num_rollouts": 8, "loss": 0.0, "entropy": entropy}
        for step, entropy in enumerate(entropies, start=1)
    ]
    config = SFPOConfig(
        trigger="two_sided",
        entropy_window=3,
        entropy_zscore_threshold=1.3,
        entropy_relative_threshold=relative,
        entropy_patience=2,
        latch=False,
    )
    train = curves_of(run_of(tmp_path / "run", lines, sfpo=asdict(config))).train
    own, seen, falls = EntropyGate.of(config), [], []
    for entropy in entropies:
        own.observe(entropy)
        seen.append((own.zscore, own.bound))
        mean = own.baseline.mean if own.baseline is not None else -math.inf
        far = relative is not None and entropy <= (1 - relative) * mean
        falls.append(far or (own.zscore is not None and own.zscore <= -1.3))
    assert list(zip(train["z"], train["bound"], strict=True)) == seen
    lows = zip(entropies, train["low_bound"], strict=True)
    beyond = [low is not None and entropy <= low for entropy, low in lows]
    assert beyond == falls and any(falls) and not all(falls)


def test_phases_make_up_the_step(tmp_path: Path) -> None:
    """What is named and the rest; phases that run beside the step are no part of it."""
    times = {"generate": 3.0, "passes": 2.0, "wait": 1.0, "refit": 0.5, "step": 8.0}
    line = {"step": 1, "num_rollouts": 8, "loss": 0.0}
    line |= {f"time/{name}_s": seconds for name, seconds in times.items()}
    curves = curves_of(run_of(tmp_path / "a", [line]))
    assert curves.phases == ("generate", "passes", "wait", "refit", "other")
    assert curves.train["time/other"] == [1.5]
    ahead = curves_of(run_of(tmp_path / "b", [line], rollout={"async_steps": 1}))
    assert ahead.phases == ("passes", "wait", "refit", "other")
    assert ahead.train["time/other"] == [4.5]


def test_a_long_run_is_thinned_by_means(tmp_path: Path) -> None:
    """The mean of a value; of a sum, its end. The close of the gate stays exact."""
    run = read_run(write_report_run(tmp_path / "run", num_steps=90, gate_closes=40), "run")
    curves = curves_of(run)
    small = thinned(curves, 3)
    assert small.steps_a_row == 3 and len(small.train["step"]) == 30
    rewards = [value for value in curves.train["reward_mean"] if value is not None]
    assert small.train["reward_mean"][1] == pytest.approx(sum(rewards[3:6]) / 3)
    assert small.train["rollouts"][:2] == [3 * ROLLOUTS, 6 * ROLLOUTS]
    assert small.close_step == 40


def test_values_that_are_none_are_no_zeros(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "num_rollouts": 8, "reward_mean": None, "entropy": 1.0},
        {"step": 2, "num_rollouts": 16, "reward_mean": 0.5, "entropy": True},
    ]
    curves = curves_of(run_of(tmp_path / "run", lines))
    assert curves.train["reward_mean"] == [None, 0.5]
    assert curves.train["entropy"] == [1.0, None]
    assert "grad_norm" not in curves.train


# ---- arms -----------------------------------------------------------------------------------


def arms_in(tmp_path: Path, **runs: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, names of its runs) of each arm."""
    read = [
        read_run(write_report_run(tmp_path / name, num_steps=1, **how), name)
        for name, how in runs.items()
    ]
    return [(arm.name, [read[index].name for index in arm.runs]) for arm in grouped(read)]


def test_seeds_of_one_setting_are_an_arm(tmp_path: Path) -> None:
    """Whatever their warm starts and lengths are; K sets them apart."""
    assert arms_in(
        tmp_path,
        a={"seed": 0},
        b={"seed": 1},
        c={"seed": 0, "num_fast_passes": 0},
        d={"seed": 2},
    ) == [("SFPO K=3 α=0.8", ["a", "b", "d"]), ("GRPO", ["c"])]


def test_another_setting_is_another_arm_and_is_named(tmp_path: Path) -> None:
    """A learning rate apart is no seed."""
    lr = {"num_steps": 1, "optimizer": {"lr": 5e-6}}
    assert arms_in(tmp_path, a={"seed": 0}, b={"seed": 1, "train": lr}) == [
        ("SFPO K=3 α=0.8, lr 1e-06", ["a"]),
        ("SFPO K=3 α=0.8, lr 5e-06", ["b"]),
    ]


def test_what_is_written_beside_a_run_sets_no_arm_apart(tmp_path: Path) -> None:
    """Traces, like checkpoints and evaluations."""
    assert arms_in(
        tmp_path,
        a={"seed": 0},
        b={"seed": 1, "trace": {"steps": [2]}},
        c={"seed": 2, "checkpoint": {"every": 1}, "eval": {"every": 3}},
    ) == [("SFPO K=3 α=0.8", ["a", "b", "c"])]


def test_two_models_are_two_arms(tmp_path: Path) -> None:
    """Each with its seeds; seeds of a warm start, a model each, are one (above)."""
    runs = {
        f"{size}/{seed}": {"seed": seed, "model": {"path": f"models/Qwen2.5-{size}"}}
        for size in ("7B", "1.5B")
        for seed in range(2)
    }
    assert arms_in(tmp_path, **runs) == [
        ("SFPO K=3 α=0.8, path Qwen2.5-7B", ["7B/0", "7B/1"]),
        ("SFPO K=3 α=0.8, path Qwen2.5-1.5B", ["1.5B/0", "1.5B/1"]),
    ]


def test_a_config_of_an_earlier_version_is_compared_by_its_defaults(tmp_path: Path) -> None:
    """What it could not say yet is what it is where nobody says it; a long value is named alone."""
    base = {"model": {"path": "m"}, "train": {"num_steps": 9}}
    source = {"source": "reasoning_gym", "task": "chain_sum", "size": 9}
    old = {**base, "data": {"train": [source]}}
    new = {**base, "data": {"train": [{**source, "weight": 1.0}]}, "seed": 1}
    other = {**base, "data": {"train": [{**source, "size": 10}]}}
    runs = [
        run_of(tmp_path / str(n), [], output_dir=str(n), **one)
        for n, one in enumerate((old, new, other))
    ]
    assert [(arm.name, arm.runs) for arm in grouped(runs)] == [
        ("SFPO K=3 α=0.8, another train (1)", (0, 1)),
        ("SFPO K=3 α=0.8, another train (2)", (2,)),
    ]


def test_what_only_fast_passes_use_does_not_set_plain_runs_apart(tmp_path: Path) -> None:
    plain = {"num_fast_passes": 0}
    sfpo = {"num_fast_passes": 0, "alpha": 0.5, "entropy_window": 9}
    assert len(arms_in(tmp_path, a=plain, b={**plain, "sfpo": sfpo})) == 1


def test_means_are_over_the_steps_that_all_seeds_have() -> None:
    """A seed that is behind does not let the others speak for it."""
    ahead = {"step": [1, 2, 3], "rollouts": [8, 16, 24], "accuracy": [0.1, 0.2, 0.9]}
    behind = {"step": [1, 2], "rollouts": [8, 16], "accuracy": [0.3, 0.6]}
    axes, bands = over_seeds([ahead, behind], ["accuracy", "nothing"])
    assert axes == {"step": [1, 2], "rollouts": [8, 16]}
    assert bands["accuracy"].mean == pytest.approx([0.2, 0.4])
    assert (bands["accuracy"].low, bands["accuracy"].high) == ([0.1, 0.2], [0.3, 0.6])
    assert "nothing" not in bands


def test_the_drift_by_pass_is_of_steps_with_fast_passes(tmp_path: Path) -> None:
    """The one pass of a closed gate, whose drift is another thing, is not in it."""
    lines = [
        {"step": 1, "num_rollouts": 8, "loss": 0, "pass_1/ppo_kl": 0.1, "pass_2/ppo_kl": 0.3},
        {"step": 2, "num_rollouts": 16, "loss": 0, "pass_1/ppo_kl": 0.3, "pass_2/ppo_kl": 0.5},
        {"step": 3, "num_rollouts": 24, "loss": 0, "pass_1/ppo_kl": 9.0},
    ]
    curves = curves_of(run_of(tmp_path / "run", lines))
    assert drift_profile([curves]) == pytest.approx([0.2, 0.4])


# ---- the target -----------------------------------------------------------------------------


def seed_of(*accuracies: float) -> Curves:
    """A run with an evaluation after every step of 10 rollouts, 2 s and 4 passes."""
    steps = [float(step) for step in range(len(accuracies))]
    evals: dict[str, list[float | None]] = {
        "step": [*steps],
        "rollouts": [10 * step for step in steps],
        "seconds": [2 * step for step in steps],
        "passes": [4 * step for step in steps],
        "accuracy": [*accuracies],
    }
    return Curves(train={}, evals=evals, phases=(), num_passes=4, close_step=None)


def test_a_target_is_reached_at_the_first_evaluation_at_or_above_it() -> None:
    found = reached(seed_of(0.1, 0.4, 0.6, 0.5, 0.7), 0.6)
    assert (found.step, found.costs) == (2, {"rollouts": 20, "seconds": 4, "passes": 8})
    assert found.best == 0.7


def test_a_seed_that_never_gets_there_costs_without_end() -> None:
    found = reached(seed_of(0.1, 0.4), 0.6)
    assert found.step is None and set(found.costs.values()) == {math.inf}
    assert (found.best, found.spent["rollouts"]) == (0.4, 10)


def test_the_chosen_target_is_within_reach_of_half_of_every_arm() -> None:
    """Nine tenths of the way to the weaker arm's lower median, in whole percent; nothing where all
    is below the start."""
    strong = [seed_of(0.2, 0.9), seed_of(0.2, 0.8)]
    weak = [seed_of(0.2, 0.3), seed_of(0.2, 0.678), seed_of(0.2, 0.7)]
    assert chosen_target([strong, weak]) == 0.63
    assert chosen_target([[seed_of(0.5, 0.4)]]) is None
    assert chosen_target([strong, [seed_of()]]) is None


def test_a_ratio_is_of_medians_with_its_interval() -> None:
    """Against all resamples, of which two seeds have few: of 4 x 4 medians each."""
    found = ratio([100.0, 200.0], [50.0, 100.0])
    assert found.value == 2.0
    above = [median((a, b)) for a in (100, 200) for b in (100, 200)]
    below = [median((a, b)) for a in (50, 100) for b in (50, 100)]
    whole = sorted(a / b for a in above for b in below)
    assert (found.low, found.high) == (whole[0], whole[-1])  # 1 of 16 is more than 2.5 %


def test_the_interval_covers_as_often_as_it_says() -> None:
    """The true ratio of 2 is missed in few of 10 comparisons of ten seeds."""
    rng = random.Random(1)
    inside = 0
    for _ in range(10):
        base = [200 * math.exp(rng.gauss(0, 0.3)) for _ in range(10)]
        arm = [100 * math.exp(rng.gauss(0, 0.3)) for _ in range(10)]
        found = ratio(base, arm)
        assert found.low is not None and found.high is not None
        inside += found.low <= 2.0 <= found.high
    assert 8 <= inside <= 10


def test_seeds_that_never_get_there_open_the_interval() -> None:
    """On the side that they speak for; with none there at all nothing can be said."""
    inf = math.inf
    baseline = ratio([100.0, 120.0, inf], [50.0, 55.0, 60.0])
    assert baseline.value == pytest.approx(120 / 55) and baseline.high == inf
    arm = ratio([100.0, 110.0, 120.0], [50.0, 55.0, inf])
    assert arm.value == 2.0 and arm.low == 0.0
    assert ratio([inf, inf], [inf, inf]).value is None
    assert ratio([inf, inf], [50.0, 60.0]).value == inf
    assert ratio([100.0], [50.0, 60.0]).low is None


def test_resamples_that_say_nothing_open_both_sides() -> None:
    """A baseline that never got there, against an arm of which a third of the resamples has not."""
    found = ratio([math.inf, math.inf], [50.0, 50.0, math.inf])
    assert (found.value, found.low, found.high) == (math.inf, 0.0, math.inf)
