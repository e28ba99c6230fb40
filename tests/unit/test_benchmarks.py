"""The benchmarks' own arithmetic, and that their pieces run; the figures are in their results.

Not exercised here: the train steps of overhead/steps.py, GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made.processes import gone
from made.waiting import wait_for

from benchmarks import logprobs, sfpo_overhead, startup
from benchmarks.common import clock, provenance
from benchmarks.common.isolated import isolated
from benchmarks.overhead import memory, speed, steps, weights

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_the_sizes_are_what_they_say() -> None:
    for name, sizes in weights.SIZES.items():
        said = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        num = sum(torch.Size(shape).numel() for shape in sizes.shapes())
        assert num == pytest.approx(said, rel=0.06), name
    assert {*weights.ON_CPU, *weights.ON_GPU} == weights.SIZES.keys()


def test_the_reference_way_is_the_same_update() -> None:
    shards = weights.PlainShards(weights.SIZES["1M"], CPU)
    start = [t.clone() for t in shards.tensors()]
    weights.reference_way(shards.tensors(), 0.8)  # slow and fast are the same: nothing moves
    assert all(torch.allclose(a, b) for a, b in zip(shards.tensors(), start, strict=True))


SECONDS = {"copy": 0.8, "snapshot": 1.0, "reposition": 1.4, "one_tensor_lerp": 0.7,
           "reference": 7.2}  # fmt: skip


class FixedClock:
    """Every arm runs once; the times are given."""

    seconds: Mapping[str, float]

    def __init__(self, device: torch.device) -> None:
        pass

    def compare(
        self, arms: Mapping[str, Callable[[], object]], *, budget_s: float
    ) -> tuple[dict[str, clock.Times], int]:
        for arm in arms.values():
            arm()
        return {n: clock.Times(median_s=self.seconds[n], quartiles_s=(0, 0)) for n in arms}, 1


def measured(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> dict[str, Any]:
    monkeypatch.setattr(speed, "Clock", FixedClock)
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(FixedClock, "seconds", SECONDS | seconds, raising=False)
    return speed.measure("1M", CPU, 0.0)


def test_the_floor_is_twenty_bytes_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 8 bytes a parameter takes 0.8 s, so 20 take 2.0 s; ours took 2.4 s."""
    row = measured(monkeypatch)
    assert row["floor_s"] == pytest.approx(2.0)
    assert row["ratio_to_floor"] == pytest.approx(1.2)
    assert row["ratio_to_one_tensor"] == pytest.approx(1.6)
    assert row["speedup_over_reference"] == pytest.approx(3.0)
    assert row["copy_gb_per_s"] == pytest.approx(8 * row["num_params"] / 0.8e9)
    assert row["reached"] and "| yes |" in speed.line(row)


def test_a_bounded_copy_counts_as_often_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is of a quarter of the parameters, in a quarter of the time."""
    whole = measured(monkeypatch)
    monkeypatch.setattr(speed, "LARGEST_COPY", whole["num_params"] // 4)
    row = measured(monkeypatch, copy=0.2, one_tensor_lerp=0.175)
    for name in ("floor_s", "copy_gb_per_s", "ratio_to_floor", "ratio_to_one_tensor"):
        assert row[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("miss", "goal"),
    [
        ({"reposition": 1.7}, "1.35 x floor, to reach: at most 1.3"),
        ({"reference": 5.9}, "2.46 x faster than the reference's way, to reach: at least 2.5"),
    ],
)
def test_a_missed_goal_is_named(
    monkeypatch: pytest.MonkeyPatch, miss: dict[str, float], goal: str
) -> None:
    row = measured(monkeypatch, **miss)
    assert not row["reached"] and row["missed"] == [goal]
    assert f"| NO: {goal} |" in speed.line(row)


def test_on_a_gpu_the_floor_is_nearer_and_the_reference_may_have_no_room() -> None:
    assert speed.goals_missed("cpu", 1.2, None) == speed.goals_missed("cuda", 1.15, None) == []
    assert speed.goals_missed("cuda", 1.2, None) == ["1.20 x floor, to reach: at most 1.15"]
    assert speed.has_room(CPU, 1) and not speed.has_room(CPU, 2**60)


def test_goals_of_a_train_step_are_named() -> None:
    assert steps.goals_missed(1.01, 4, 4) == []
    overhead, gathers = steps.goals_missed(1.02, 5, 4)
    assert "1.0200" in overhead and gathers.startswith("5 gathers, to reach: at most the 4")


def test_a_call_is_timed_with_its_own_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot's copy on another stream is hidden behind the pass that follows."""
    order: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: order.append("stream"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("device"))
    watch = steps.Stopwatch()
    watch("snapshot", order.append, "call")
    assert order == ["stream", "call", "stream"] and watch.times["snapshot"] >= 0


def test_a_rank_ends_with_what_started_it(tmp_path: Path) -> None:
    """In a session of its own, as torchrun's are."""
    file = tmp_path / "rank"
    rank = (
        "import os, sys, time\nfrom pathlib import Path\nfrom benchmarks.overhead import steps\n"
        "def wait():\n    Path(sys.argv[1]).write_text(str(os.getpid()))\n    time.sleep(300)\n"
        "steps.count_gathers = wait\nsteps.main()"
    )
    code = (
        "import subprocess, sys\n"
        f"command = [sys.executable, '-c', {rank!r}, {str(file)!r}, '1']\n"
        "subprocess.run(command, start_new_session=True)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: file.exists() and file.read_text(), timeout_s=120, what="the rank")
    starter.kill()
    starter.wait()
    assert gone(int(file.read_text()))


def test_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_EVICT_BYTES", 64)
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    times, rounds = clock.Clock(CPU).compare(arms, budget_s=0.0)
    assert rounds == 7 and set(times) == set("abc")
    assert order[:12] == [*"abc", *"abc", *"bca", *"cab"]  # the first round is not timed


@pytest.mark.parametrize("arm", ["device", "reference"])
def test_memory_is_measured(arm: str) -> None:
    row = isolated(memory.measure, "10M", CPU, arm)
    assert row["shard_bytes"] == 4 * row["num_params"]
    assert row["missed"] == []
    if arm == "device":
        assert 0.9 < row["copies_beside_staging"] < 1.1, row
    else:
        assert row["copies_beside_staging"] > 1.9, row


def test_a_peak_that_cannot_be_reset_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "RESET_PEAK", tmp_path / "none" / "clear_refs")
    row = memory.measure("1M", CPU, "device")
    assert row["peak_extra_host_bytes"] is row["copies_beside_staging"] is row["reached"] is None
    assert row["missed"] == [] and "| 0.0 | ? | 0.0 | ? |  |" in memory.line(row)


def test_provenance_names_commit_versions_and_hardware(tmp_path: Path) -> None:
    provenance.write(tmp_path / "r.json", {"x": 1}, device=CPU, features=["overhead"])
    text = (tmp_path / "r.json").read_text()
    assert f'"torch": "{torch.__version__}"' in text and '"device": "cpu"' in text


def test_a_run_that_is_cut_off_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of them shows no feature."""
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["logprobs.py", "--device", "cpu", "--out", str(file)])
    given: list[object] = []

    def cut(function: object, *arguments: object) -> dict[str, object]:
        given.append(arguments)
        if len(given) == 3:
            raise KeyboardInterrupt
        return {"row": len(given)}

    monkeypatch.setattr(logprobs, "isolated", cut)
    monkeypatch.setattr(logprobs, "line", str)
    with pytest.raises(KeyboardInterrupt):
        logprobs.main()
    content = json.loads(file.read_text())
    assert content["rows"] == [{"row": 1}, {"row": 2}] and content["features"] == []


def test_an_overhead_that_is_cut_off_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "parts.json"
    arguments = ["sfpo_overhead.py", "--device", "cpu", "--sizes", "1M", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)

    def one(function: object, *arguments: object) -> dict[str, object]:
        if function is memory.measure:
            raise KeyboardInterrupt
        return {"size": "1M"}

    monkeypatch.setattr(sfpo_overhead, "isolated", one)
    monkeypatch.setattr(speed, "line", str)
    monkeypatch.setattr(steps, "measure", lambda *_: "not measured")
    with pytest.raises(KeyboardInterrupt):
        sfpo_overhead.main()
    content = json.loads(file.read_text())
    assert content["speed"] == [{"size": "1M"}] and content["steps"] == "not measured"
    assert content["features"] == []


def test_the_script_starts() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/sfpo_overhead.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "seconds and bytes" in done.stdout, done.stderr


def test_a_start_is_split_by_what_was_waited_for() -> None:
    """What is between two stages counts for the one before; a run that ended is no figure."""
    events = [(1.0, "import"), (3.0, ""), (4.0, "build"), (9.0, "engines"), (9.5, "engines")]
    found = startup.stages([*events, (12.0, "started")])
    assert found == {"launch": 1.0, "import": 3.0, "build": 5.0, "engines": 3.0, "total": 12.0}
    with pytest.raises(RuntimeError, match="ended before its first step"):
        startup.stages(events)
