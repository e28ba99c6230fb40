"""Paired comparisons of the study in examples/sfpo_vs_grpo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made.study_runs import study_modules


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The study's modules, with results in a folder of the test's own."""
    yield from study_modules(tmp_path, monkeypatch)


def test_ratio_of_pairs(modules: dict[str, ModuleType]) -> None:
    """Against values worked out by hand: t of 2 degrees of freedom is 4.3027."""
    pairs = modules["pairs"]
    found = pairs.paired_ratio([100.0, 200.0, 400.0], [100.0, 100.0, 100.0], budget=1000)
    assert found.value == pytest.approx(2.0)
    half = 4.302653 * math.log(2) / math.sqrt(3)
    expected = (2 * math.exp(-half), 2 * math.exp(half))
    assert found.t_interval == pytest.approx(expected, rel=1e-5)
    assert 1 <= found.bootstrap[0] < 2 < found.bootstrap[1] <= 4
    assert found.bounds == ""
    bounded = pairs.paired_ratio([None, 200.0], [100.0, 100.0], budget=800)
    assert bounded.value == pytest.approx(4.0) and bounded.bounds == "1 lower"
    assert pairs.t_quantile(9) == pytest.approx(2.262157, abs=1e-6)
    for costs in ([100.0, 0.0], [0.0, 100.0]):
        with pytest.raises(ValueError, match=r"pair \d: found the costs .*, expected some above 0"):
            pairs.paired_ratio(costs, [100.0, 100.0], budget=800)


def test_pairs_that_are_bounds_are_told_apart(modules: dict[str, ModuleType]) -> None:
    """Lower where only the first never got there, upper where only the second, open where neither
    did."""
    found = modules["pairs"].paired_ratio(
        [None, 200.0, None, None, 400.0], [100.0, None, None, None, 400.0], budget=800
    )
    assert (found.num_lower, found.num_upper, found.num_open) == (1, 1, 2)
    assert found.bounds == "1 lower, 1 upper, 2 open"
    assert found.value == pytest.approx((8 * 0.25) ** (1 / 5))


def test_quotient_of_independent_ratios(modules: dict[str, ModuleType]) -> None:
    """Widths on the log scale are added as squares: 3 and 4 make 5."""
    pairs = modules["pairs"]

    def ratio(value: float, width: float) -> Any:
        bounds = (value * math.exp(-width), value * math.exp(width))
        return pairs.PairedRatio(value=value, t_interval=bounds, bootstrap=bounds)

    value, bounds = pairs.quotient(ratio(6.0, 0.3), ratio(2.0, 0.4))
    assert value == 3.0 and bounds == pytest.approx((3 * math.exp(-0.5), 3 * math.exp(0.5)))


def test_difference_of_pairs(modules: dict[str, ModuleType]) -> None:
    """t of 1 degree of freedom is 12.706; the differences are 1 and 3."""
    found = modules["pairs"].paired_difference([2.0, 5.0], [1.0, 2.0])
    assert found.value == 2.0
    assert found.t_interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
