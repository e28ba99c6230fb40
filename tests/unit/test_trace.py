"""Spans, the files that processes write them into, and the pictures made of these.

Not here: which spans a real run has (tests/e2e/test_cli_run.py).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.tracing import TraceConfig
from sfpo_megatron.host.phases import doing
from sfpo_megatron.host.spans import Detail, forget_watcher, span, watch_spans
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.trace import (
    NoTrace,
    Span,
    SpanFile,
    Trace,
    begin_trace,
    lanes,
    picture,
    record_spans,
)
from sfpo_megatron.tracking.profiler import StepProfiler


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run whose folder of spans is gone at the end, so that nothing here watches any longer."""
    directory = RunDirectory.of(tmp_path)
    yield directory
    begin_trace(directory, [])
    with span("the last"):
        pass


def written(path: Path, process: str, *spans: Span) -> None:
    """A span file as the process has left it."""
    lines = [[process, f"{process} (host, pid 1)"], *spans]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(events: list[Any]) -> dict[str, list[tuple[str, str, float, float]]]:
    """By process: (line, span, begin and end in ms)."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[tuple[str, str, float, float]]] = {name: [] for name in names.values()}
    for event in (e for e in events if e["ph"] == "X"):
        track = tracks[event["pid"], event["tid"]]
        begin, end = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
        found[names[event["pid"]]].append((track, event["name"], begin, end))
    return found


def test_nobody_watches_by_default() -> None:
    with span("a", number=1):
        pass


def test_a_watcher_sees_spans_and_phases_with_their_details() -> None:
    seen: list[tuple[str, dict[str, Detail]]] = []

    class Watcher:
        def __call__(self, name: str, details: dict[str, Detail]) -> Any:
            seen.append((name, details))
            return threading.Lock()  # any context manager

    watcher = Watcher()
    watch_spans(watcher)
    try:
        with doing("step", step=3), span("pass"):
            pass
        with pytest.raises(ValueError, match="out"), span("fails"):
            raise ValueError("out")
    finally:
        forget_watcher(watcher)
    with span("later"):
        pass
    assert seen == [("step", {"step": 3}), ("pass", {}), ("fails", {})]


def test_a_step_is_drawn_over_all_processes_from_its_begin_to_the_next(run: RunDirectory) -> None:
    run.spans.mkdir(parents=True)
    ms = 1_000_000
    base = 1_700_000_000_000 * ms
    at = lambda begin, end: (base + begin * ms, base + end * ms)  # noqa: E731
    steps = [Span("step", *at(100 * n, 100 * n + 60), "", {"step": n}) for n in (1, 2, 3)]
    written(run.spans / "rank-0.h.1.jsonl", "rank 0", *steps, Span("save", *at(270, 280), "", {}))
    written(run.spans / "rank-10.h.9.jsonl", "rank 10", Span("passes", *at(210, 250), "", {}))
    written(
        run.spans / "rank-2.h.3.jsonl",
        "rank 2",
        Span("passes", *at(190, 220), "", {}),
        Span("step", *at(299, 350), "", {"step": 3}),
    )
    written(
        run.spans / "engine-0.h.2.jsonl",
        "engine 0",
        Span("generate", *at(195, 205), "calls", {"rollouts": 16}),
        Span("generate", *at(201, 210), "calls", {}),
        Span("generate", *at(300, 310), "calls", {}),
    )
    (run.spans / "controller.h.4.jsonl").write_text('["controller", "controller (h, pid 4)"]\n["ha')
    events = picture(run.spans, 2)
    assert drawn(events) == {
        "rank 0 (host, pid 1)": [("main", "step", 0, 60), ("main", "save", 70, 80)],
        "rank 2 (host, pid 1)": [("main", "passes", -10, 20)],
        "rank 10 (host, pid 1)": [("main", "passes", 10, 50)],
        "engine 0 (host, pid 1)": [
            ("calls", "generate", -5, 5),
            ("calls", "generate", 1, 10),  # on a line of its own: they overlap
        ],
    }
    assert len({(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}) == 5
    assert {"rollouts": 16} in [e["args"] for e in events]
    assert [e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"] == [
        *(1, 2, 3, 5)
    ]
    last = drawn(picture(run.spans, 3))
    assert last["rank 0 (host, pid 1)"] == [("main", "step", 0, 60)]
    assert last["engine 0 (host, pid 1)"] == [("calls", "generate", 0, 10)]
    assert picture(run.spans, 4) == []


def test_lanes_keep_what_overlaps_apart_and_what_is_inside_together() -> None:
    def spans(*times: tuple[int, int]) -> list[Span]:
        return [Span("x", begin, end, "", {}) for begin, end in times]

    def times(*given: tuple[int, int]) -> list[list[tuple[int, int]]]:
        return [[(one.begin, one.end) for one in lane] for lane in lanes(spans(*given))]

    assert times((0, 10), (2, 5), (3, 4), (5, 9), (10, 11)) == [
        [(0, 10), (2, 5), (3, 4), (5, 9), (10, 11)]
    ]
    assert times((0, 5), (2, 7), (4, 9), (5, 6)) == [[(0, 5), (5, 6)], [(2, 7)], [(4, 9)]]
    assert times((0, 5), (0, 9)) == [[(0, 9), (0, 5)]]


def test_what_a_process_writes_is_read_back(run: RunDirectory) -> None:
    trace = begin_trace(run, [2, 1])
    record_spans(run, "rank 0")
    with doing("step", step=1), span("inside", track="other", number=7):
        pass
    trace.logged(1)
    assert not list(run.trace.glob("step_*"))  # a picture lasts until the next step begins
    with doing("step", step=2):
        pass
    trace.logged(2)
    assert [path.name for path in run.trace.glob("step_*")] == ["step_0000001.json"]
    found = json.loads((run.trace / "step_0000001.json").read_text())["traceEvents"]
    (process,) = drawn(found)
    assert process.startswith("rank 0 (") and f"pid {os.getpid()}" in process
    assert [(line[0], line[1]) for line in drawn(found)[process]] == [
        ("main", "step"),
        ("other", "inside"),
    ]
    trace.close()
    assert (run.trace / "step_0000002.json").exists() and not run.spans.exists()


def test_the_writing_ends_once_the_last_picture_is_drawn(run: RunDirectory) -> None:
    trace = begin_trace(run, [1])
    record_spans(run, "rank 0")
    (file,) = run.spans.iterdir()
    descriptor = os.open(file, os.O_RDONLY)  # what is left of it
    for step in (1, 2):
        with doing("step", step=step):
            pass
        trace.logged(step)
    size = os.fstat(descriptor).st_size
    assert not run.spans.exists() and size > 0
    with span("after"):
        pass
    assert os.fstat(descriptor).st_size == size
    os.close(descriptor)
    record_spans(run, "engine 0")  # one that is restarted later
    assert not run.spans.exists()


def test_steps_that_are_never_reached_leave_nothing(run: RunDirectory) -> None:
    trace = begin_trace(run, [50])
    record_spans(run, "rank 0")
    with doing("step", step=1):
        pass
    trace.logged(1)
    trace.close()
    assert list(run.trace.iterdir()) == []


def test_an_earlier_start_that_was_killed_is_not_drawn(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_trace(run, [1])
    written(run.spans / "rank-0.h.1.jsonl", "rank 0", Span("step", 0, 9, "", {"step": 1}))
    assert isinstance(begin_trace(run, [1]), Trace)
    with monkeypatch.context() as patched:  # as on NFS, while an old process has a file of it open
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        assert isinstance(begin_trace(run, [1]), Trace)
    assert list(run.spans.iterdir()) == []
    assert isinstance(begin_trace(run, []), NoTrace) and not run.spans.exists()


def test_threads_do_not_mix_their_lines(run: RunDirectory) -> None:
    trace = begin_trace(run, [1])
    record_spans(run, "rank 0")

    def work(number: int) -> None:
        for _ in range(200):
            with span("x" * 200, track=f"thread {number}"):
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = run.spans.iterdir()
    lines = file.read_text().splitlines()
    assert len(lines) == 801 and all(json.loads(line) for line in lines)
    trace.close()


def test_a_full_disk_ends_the_writing_and_not_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.spans.mkdir(parents=True)
    file = SpanFile(run.spans / "x.jsonl", "rank 0")
    watch_spans(file)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with span("a"):
        pass
    monkeypatch.undo()
    with span("b"):
        pass
    assert len((run.spans / "x.jsonl").read_text().splitlines()) == 1


def test_torch_profiler_writes_the_steps_that_are_asked_for(run: RunDirectory) -> None:
    import gzip

    import torch

    profiler = StepProfiler(TraceConfig(steps=(2,), torch_profiler=True), run, rank=1)
    watch_spans(profiler)
    try:
        for step in (1, 2):
            with doing("step", step=step):
                torch.ones(3) @ torch.ones(3)
    finally:
        forget_watcher(profiler)
    (file,) = run.trace.iterdir()
    assert file.name == "step_0000002_rank_1.torch.json.gz"
    names = {
        event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    }
    assert "aten::dot" in names


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": (0,)}, r"steps: found \[0\], expected numbers >= 1"),
        ({"torch_profiler": True}, "torch_profiler: found True, expected false without steps"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FieldError, match=says):
        TraceConfig(**settings)


def test_what_a_full_disk_has_cut_short_is_left_out(run: RunDirectory) -> None:
    """An empty file, one without its first line, a line in two halves: the rest is drawn."""
    trace = begin_trace(run, [1])
    main, second = run.spans / "rank-0.jsonl", 10**9
    steps = [Span("step", n * second, n * second + 5000, "", {"step": n}) for n in (1, 2)]
    written(main, "rank 0", *steps)
    lines = main.read_text().split("\n")
    main.write_text("\n".join([lines[0], lines[1][:9] + lines[2], *lines[1:]]))
    (run.spans / "rank-1.jsonl").touch()
    (run.spans / "rank-2.jsonl").write_text('["rank 2", "ra\n' + lines[1] + "\n")
    (run.spans / "rank-3.jsonl").write_bytes(b'["rank 3", "rank 3"]\n\xff\n[1, 2]\n3\n')
    trace.logged(2)
    events = json.loads((run.trace / "step_0000001.json").read_text())["traceEvents"]
    assert drawn(events) == {"rank 0 (host, pid 1)": [("main", "step", 0.0, 0.005)]}


def test_a_picture_that_cannot_be_drawn_ends_no_run(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = begin_trace(run, [1])
    written(run.spans / "rank-0.jsonl", "rank 0", Span("step", 1, 2, "", {"step": 1}))
    picture_file = run.trace / "step_0000001.json"
    picture_file.mkdir()  # in its place
    trace.logged(2)
    assert f"warning: {picture_file} is not drawn: " in capsys.readouterr().err
    assert not run.spans.exists()
