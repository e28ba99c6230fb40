"""The arithmetic of benchmarks/refit.py, and that its pieces run; figures are in its results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import refit
from benchmarks.refitting.peaks import extra_bytes

ROOT = Path(__file__).parents[2]
GB = 10**9


def row(way: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "size": "100M", "layout": "TP1", "way": way, "model_bytes": GB, "median_s": seconds,
        "gb_per_s": 1 / seconds, "trainer_peak_bytes": 0, "engine_peak_bytes": 0,
        "largest_tensor_bytes": 1, **more,
    }  # fmt: skip


def test_the_floor_is_a_copy_for_each_hop() -> None:
    """10 GB/s: three hops of 1 GB are 0.3 s; at 2 GB/s packing takes 0.5 s of 0.7 s. The faster
    naive way counts."""
    rows = [row("streamed", 0.6), row("save_and_restart", 12.0), row("save_and_reload", 9.0)]
    streamed, restart, _ = refit.judged(rows, 10.0, 2.0)
    assert streamed["floor_s"] == pytest.approx(0.3)
    assert streamed["ratio_to_floor"] == pytest.approx(2.0)
    assert streamed["ratio_to_floor_with_packing"] == pytest.approx(0.6 / 0.7)
    assert streamed["speedup_over_save_and_reload"] == pytest.approx(15.0)
    assert streamed["speedup_over_save_and_restart"] == pytest.approx(20.0)
    assert streamed["reached"] and "| yes" in refit.line(streamed)
    assert "reached" not in restart


@pytest.mark.parametrize("seconds", [0.95, 0.91])
def test_a_missed_target_is_said(seconds: float) -> None:
    rows = [row("streamed", seconds), row("save_and_reload", 9.0)]
    assert "| NO" in refit.line(refit.judged(rows, 10.0, 2.0)[0])


def test_memory_of_a_process_is_sampled() -> None:
    found = extra_bytes(lambda: torch.ones(2**24).sum().item(), {"me": os.getpid()})
    assert 0.8 * 2**26 < found["me"] < 2 * 2**26
    assert extra_bytes(lambda: None, {"me": os.getpid()}, {"me": 0})["me"] > 2**26


@pytest.mark.parametrize("script", ["refit", "overlap"])
def test_the_scripts_start(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "--out" in done.stdout, done.stderr
