"""The table and the plot, from a synthetic metrics.jsonl whose answers are known."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.json_lines import read_lines
from sfpo_megatron.outputs.metrics import cut_metrics, read_metrics
from sfpo_megatron.outputs.plot import plot
from sfpo_megatron.outputs.report.reading import ReportError, read_run
from sfpo_megatron.outputs.shown import shown
from sfpo_megatron.outputs.starts import note_start
from sfpo_megatron.outputs.table import summary_table

NUM_STEPS, ROLLOUTS, GATE_CLOSES = 80, 256, 48


def write_run(path: Path, *, gate_closes: int = GATE_CLOSES) -> Path:
    """A run that learns: reward and accuracy rise, the gate closes at step `gate_closes`."""
    rng = random.Random(0)
    lines: list[dict[str, object]] = [{"step": 0, "eval/accuracy": 0.25}]
    optimizer_steps = 0
    for step in range(1, NUM_STEPS + 1):
        level = 0.25 + 0.4 * (1 - math.exp(-step / 25))
        active = step < gate_closes
        optimizer_steps += 8 if active else 2
        lines.append(
            {
                "step": step,
                "num_rollouts": step * ROLLOUTS,
                "reward_mean": level + rng.gauss(0, 0.03),
                "accuracy": level + rng.gauss(0, 0.03),
                "entropy": 1.2 * math.exp(-step / 60) + rng.gauss(0, 0.01),
                "loss": rng.gauss(0, 0.01),
                "clip_frac": abs(rng.gauss(0.04 if active else 0.01, 0.01)),
                "sfpo_active": active,
                "num_passes": 4 if active else 1,
                "num_optimizer_steps": optimizer_steps,
                "num_skipped_steps": 0,
                "time/generate_s": 1.0,
                "time/passes_s": 3.0,
                "time/step_s": 5.0,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "eval/accuracy": level})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def row(table: str, label: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(label)]
    return " ".join(line.removeprefix(label).split())


def test_table_says_start_end_best_and_cost(tmp_path: Path) -> None:
    table = summary_table(write_run(tmp_path / "metrics.jsonl"))
    end = 0.25 + 0.4 * (1 - math.exp(-80 / 25))
    assert row(table, "held-out accuracy") == (
        f"0.250 (step 0) {end:.3f} (step 80) {end:.3f} (step 80)"
    )
    assert row(table, "rollouts") == "20,480"
    assert row(table, "optimizer steps") == f"{47 * 8 + 33 * 2}"
    assert row(table, "skipped steps") == "0"
    assert row(table, "gate closed at step") == "48"
    assert row(table, "passes") == "3.000 60%"
    assert row(table, "step ") == "5.000"


def test_gate_that_never_closes_and_plain_grpo(tmp_path: Path) -> None:
    """A run that never had SFPO on (K=0) has no gate to close."""
    path = write_run(tmp_path / "a.jsonl", gate_closes=NUM_STEPS + 1)
    assert row(summary_table(path), "gate closed at step") == "never"
    path = write_run(tmp_path / "b.jsonl", gate_closes=0)
    assert read_metrics(path).gate_close_step is None


def test_the_best_is_neither_the_first_nor_the_last(tmp_path: Path) -> None:
    """An entropy has none."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "num_rollouts": 8, "loss": 0.0, "reward_mean": r, "entropy": r}
        for s, r in ((1, 0.25), (2, 0.75), (3, 0.5))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = summary_table(path)
    ends = "0.250 (step 1) 0.500 (step 3)"
    assert row(table, "train reward") == f"{ends} 0.750 (step 2)"
    assert row(table, "entropy (nats)") == ends


def test_null_values_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "num_rollouts": 8, "loss": null, "reward_mean": null, "entropy": 1.0}\n'
        '{"step": 2, "num_rollouts": 16, "loss": 0.1, "reward_mean": 0.5, "entropy": null}\n'
    )
    table = summary_table(path)
    assert row(table, "train reward").startswith("0.500 (step 2) 0.500 (step 2)")
    assert row(table, "entropy (nats)") == "1.000 (step 1) 1.000 (step 1)"


def test_a_step_logged_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "num_rollouts": 8, "reward_mean": 0.1}\n'
        '{"step": 1, "num_rollouts": 8, "reward_mean": 0.9}\n'
    )
    assert [line["reward_mean"] for line in read_metrics(path).train] == [0.9]


@pytest.mark.parametrize(
    "bad",
    [b'{"step": 2, "loss"', b"[1]", b"7", b'{"step": 2, "model": "\xff"}', b"[" * 100_000],
    ids=["half", "list", "number", "no UTF-8", "deep"],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes) -> None:
    """The page names it as the table does, and leaves out half a line that a run may be writing."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad)
    said = r"\.jsonl:2: found .*, expected a JSON object.*; remove the line"
    with pytest.raises(ValueError, match=f"metrics{said}"):
        read_metrics(path)
    assert not read_metrics(path, is_written=True).train
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ReportError, match=f"metrics{said}"):
        read_run(tmp_path, "run")
    path.rename(tmp_path / "samples.jsonl")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ReportError, match=f"samples{said}"):
        read_run(tmp_path, "run")


@pytest.mark.parametrize(
    "wrong",
    ['"step": Infinity', '"step": 1.5', '"step": "2"', '"step": true', '"num_rollouts": null',
     '"num_rollouts": "8"', '"num_rollouts": [8]'],
)  # fmt: skip
def test_a_line_without_whole_numbers_is_named(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "num_rollouts": 8, "reward_mean": 0.5}\n'
    path.write_text(f'{good}{{"step": 2, "num_rollouts": 16, "reward_mean": 0.5, {wrong}}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*a whole number as num_rollouts"):
        read_metrics(path)


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"step": 1, "num_rollouts": 8, "reward_mean": 0.5, "entropy": 1.0, "time/step_s": 2.0}
    lines = [good]
    for odd in (float("nan"), float("inf"), 1e200, 10**400, "x", [1], {"a": 1}, True, None):
        names = ("reward_mean", "entropy", "time/step_s", "num_optimizer_steps")
        lines.append({**good, "step": len(lines) + 1, **dict.fromkeys(names, odd)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = summary_table(path)
    assert row(table, "entropy (nats)") == "1.000 (step 1) 1.000 (step 1)"
    assert row(table, "step") == "2.000" and row(table, "optimizer steps") == "n/a"
    plot(path, tmp_path / "plot.png")


def test_rollouts_at_is_cumulative(tmp_path: Path) -> None:
    run = read_metrics(write_run(tmp_path / "metrics.jsonl"))
    assert [run.rollouts_at(step) for step in (0, 1, 80, 99)] == [0, 256, 20480, 20480]


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    """A PNG of the size asked for, with more than a blank page in it. Looks are not tested."""
    from PIL import Image

    plot(write_run(tmp_path / "metrics.jsonl"), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert image.size == (1260, 1064)
        assert len(set(image.convert("RGB").resize((300, 250)).getdata())) > 100


def test_a_picture_of_somebody_elses_stays(tmp_path: Path) -> None:
    """matplotlib's name in it is no sign of ours; one of ours is drawn anew, whole."""
    from matplotlib.figure import Figure

    run = RunDirectory.of(tmp_path)
    write_run(run.metrics)
    Figure().savefig(run.plot)
    mine = run.plot.read_bytes()
    for content in (mine, b"", b"sfpo-megatron"):
        run.plot.write_bytes(content)
        _, policy, _ = shown(run, resumed_after=None)
        assert f"warning: no plot ({run.plot}: found a file that is not marked" in policy
        assert policy.endswith("(0.1.0 marked none) or none; move it away)")
        assert run.plot.read_bytes() == content
    run.plot.unlink()
    run.plot.symlink_to(tmp_path / "nowhere")
    assert "warning: no plot" in list(shown(run, resumed_after=None))[1]
    run.plot.unlink()
    for _ in range(2):
        assert list(shown(run, resumed_after=None))[1].endswith(f"curve: {run.plot}")
    assert sorted(path.name for path in tmp_path.glob("plot*")) == ["plot.png"]


def test_plot_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval/accuracy": 0.25}\n')
    plot(path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    path.write_text("")
    with pytest.raises(ValueError, match="no train step"):
        plot(path, tmp_path / "empty.png")


NO_STEP = '{"step": "x"}\n{"step": null}\n{"note": 1}\n'


@pytest.mark.parametrize(
    "tail", ["", '{"step": 3, "lo', '{"step": 3}', "[1]\n", "garbage\n", NO_STEP]
)
def test_cut_metrics_keeps_lines_up_to_the_step(tmp_path: Path, tail: str) -> None:
    """Byte for byte; half a line at the end goes."""
    kept = '{"step": 0, "eval/accuracy": 0.1}\n{"step": 1, "loss": 1e-07}\n{"step": 2}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(kept + '{"step": 3}\n{"step": 4}\n' + tail)
    cut_metrics(path, 2)
    assert path.read_text() == kept
    cut_metrics(tmp_path / "none.jsonl", 2)


def test_cut_metrics_drops_what_it_cannot_read_alone(tmp_path: Path) -> None:
    """A resumed run must not end on a byte that is no UTF-8, and its other lines stay as they
    are."""
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "text": "é\u2028"}\n'.encode()
    broken = (b'{"step": 1, "text": "\xff"}\n', b"[" * 10_000 + b"\n", b"\0\0\0\n")
    path.write_bytes(b"".join((good, *broken, good, b'{"step": 3}\n', b'{"step": 2}')))
    cut_metrics(path, 2)
    assert path.read_bytes() == good * 2


@pytest.mark.parametrize("lines", [b"", b'{"run_id": "a"}\n'])
def test_half_a_line_of_a_killed_start_swallows_no_other(tmp_path: Path, lines: bytes) -> None:
    run = RunDirectory.of(tmp_path)
    run.environment.write_bytes(lines + b'{"run_id": "a", "after_st')
    note_start(run, run_id="b", after_step=1)
    found = run.environment.read_bytes()
    assert found.startswith(lines + b'{"run_id": "b", "after_step": 1, ')
    read = list(read_lines(run.environment, is_written=False))
    assert [line.content["run_id"] for line in read][-1] == "b"
    note_start(run, run_id="c", after_step=2)
    assert run.environment.read_bytes().startswith(found)


def test_broken_metrics_end_no_run_that_has_ended(tmp_path: Path) -> None:
    """Its policy is written: what cannot be shown is said."""
    run = RunDirectory.of(tmp_path)
    run.metrics.write_text('{"step": 1, "num_rollouts": 8, "loss": 0.5}\n' + "x\n")
    table, policy, report = shown(run, resumed_after=None)
    assert "warning: no table" in table and "metrics.jsonl:2: found 'x'" in table
    assert policy.startswith(f"policy: {run.hf}   warning: no plot (") and "jsonl:2" in policy
    assert report.startswith("warning: no report (") and "metrics.jsonl:2" in report
    run.metrics.write_text('{"step": 1, "num_rollouts": 8, "loss": 0.5}\n')
    table, policy, report = shown(run, resumed_after=None)
    assert "rollouts" in table and policy.endswith(f"curve: {run.plot}") and run.plot.is_file()
    assert report == f"report: {run.path / 'report.html'}"
