"""The page of a report: its file, the numbers in it, and texts of a run that would do harm.

Not exercised here: what a browser makes of it (tests/e2e/test_report_browser.py).
"""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from made.report_runs import write_report_run

from sfpo_megatron import cli
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.starts import note_start


def report(*words: str | Path) -> int:
    return cli.main(["report", *map(str, words)])


def data_in(page: Path) -> dict[str, Any]:
    """The JSON that the charts draw."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    content: dict[str, Any] = json.loads(found)
    return content


def rows_of(page: Path, caption: str) -> list[list[str]]:
    """The cells of a table, its header first."""
    text = page.read_text(encoding="utf-8")
    tables = re.findall(
        r"<table><caption><span>(.*?)</span></caption>(.*?)</table>", text, flags=re.S
    )
    (table,) = [body for said, body in tables if html.unescape(said).startswith(caption)]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t", r)] for r in rows]


def two_arms(folder: Path, *, seeds: int = 3, **how: Any) -> list[Path]:
    """SFPO, which is twice as fast, and GRPO, whose last seed never gets there."""
    runs = []
    for seed in range(seeds):
        slow = {"pace": 60.0, "ceiling": 0.9 if seed < seeds - 1 else 0.5, "num_fast_passes": 0}
        runs.append(write_report_run(folder / f"sfpo/{seed}", seed=seed, pace=30.0, **how))
        runs.append(write_report_run(folder / f"grpo/{seed}", seed=seed, **slow, **how))
    return runs


# ---- one run --------------------------------------------------------------------------------


def test_one_run_into_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_report_run(tmp_path / "run", num_steps=40, samples=2)
    assert report(run) == 0
    page = run / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    (shown,) = data_in(page)["runs"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "num_rollouts" in line]
    evals = [line for line in lines if "eval/accuracy" in line]
    assert shown["train"]["step"] == [line["step"] for line in steps]
    for name in ("reward_mean", "entropy", "pass_4/ppo_kl", "engines/busy", "engines/queue_s"):
        assert shown["train"][name] == pytest.approx([x[name] for x in steps], rel=1e-3)
    assert shown["evals"]["accuracy"] == pytest.approx(
        [x["eval/accuracy"] for x in evals], rel=1e-3
    )
    assert shown["evals"]["rollouts"] == [256 * line["step"] for line in evals]
    assert [sample["step"] for sample in shown["samples"]] == [20, 20, 40, 40]
    tiles = dict(re.findall(r"<li><span>(.*?)</span><strong>(.*?)</strong>", page.read_text()))
    end = f"{100 * evals[-1]['eval/accuracy']:.1f} %"
    assert tiles["held-out accuracy"] == f"25.0 % → {end}"
    assert (tiles["rollouts"], tiles["backward passes"]) == ("10,240", "160")
    assert tiles["train steps take"] == f"{sum(line['time/step_s'] for line in steps) / 60:.0f} min"


def test_a_report_is_made_again_and_other_files_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_report_run(tmp_path / "run", num_steps=3)
    assert report(run) == 0
    assert report(run) == 0
    mine = tmp_path / "mine.html"
    mine.write_text("<p>a page of mine")
    assert report(run, "--out", mine) == 2
    assert "has not written" in capsys.readouterr().err
    assert mine.read_text() == "<p>a page of mine"
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """Half a line at the end of each file is not read, a whole one is."""
    run = write_report_run(tmp_path / "run", num_steps=40, steps_done=12, samples=1)
    for name in ("metrics.jsonl", "samples.jsonl", "environment.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 13, "num_rollouts": 3328, "lo')
    assert report(run) == 0
    (shown,) = data_in(run / "report.html")["runs"]
    assert shown["train"]["step"][-1] == 12
    text = (run / "report.html").read_text()
    assert "12 of 40 train steps" in text


def test_what_is_known_of_a_response_is_said_in_words(tmp_path: Path) -> None:
    """And a long one is cut in its middle: the answer is at its end."""
    run = write_report_run(tmp_path / "run", num_steps=3)
    known = {"correct": False, "finished": False, "num_tokens": 9000, "parts": {"format": 0.5}}
    response = {"text": f"first {'x' * 9000} last", "reward": 0.25, **known}
    sample = {"step": 3, "prompt_id": "a/1", "prompt": "1+1=", "answer": "2"}
    lines = [{**sample, "responses": [response] * 10}, {"step": 3}]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report(run) == 0
    found, bare = data_in(run / "report.html")["runs"][0]["samples"]
    assert (found["answer"], len(found["responses"]), found["num_more"]) == ("2", 8, 2)
    shown = found["responses"][0]
    assert shown["detail"] == "wrong, cut off, 9,000 tokens, format 0.5"
    assert shown["text"].startswith("first x") and shown["text"].endswith("x last")
    assert "5,011 characters" in shown["text"] and len(shown["text"]) < 4100
    assert bare["responses"] == [] and bare["prompt"] == ""


def test_a_line_that_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_report_run(tmp_path / "run", num_steps=3, samples=1)
    for name, number in (("samples.jsonl", 3), ("metrics.jsonl", 5)):
        whole = (run / name).read_text()
        (run / name).write_text(whole + "{half\n{}\n")
        assert report(run) == 2
        assert f"{name}:{number}: found '{{half'" in capsys.readouterr().err
        (run / name).write_text(whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "run.json", "environment.jsonl"])
def test_a_file_that_is_none_of_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = write_report_run(tmp_path / "run", num_steps=3)
    (run / name).write_bytes(b"{\xff\xfe: [\n")
    assert report(run) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run / name}") and "found" in said and "expected" in said


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """They are no points, and end nothing."""
    run = write_report_run(tmp_path / "run", num_steps=3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    odd = [float("nan"), 1e300, 10**400, True, "x", [1], None]
    for value in odd:
        for line in lines[1:]:
            line |= dict.fromkeys(("entropy", "reward_mean", "time/step_s", "grad_norm"), value)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert report(run) == 0
        (shown,) = data_in(run / "report.html")["runs"]
        assert "entropy" not in shown["train"] and len(shown["train"]["step"]) == 3


def test_figures_and_settings_that_are_none(tmp_path: Path) -> None:
    """They end nothing, be it results of another version or a config written by hand."""
    run = write_report_run(tmp_path / "run", num_steps=3)
    (run / "eval").mkdir()
    good = {"num_problems": 4, "n": 2, "accuracy": 0.5, "stderr": 0.1, "pass_at": {"2": 0.75}}
    for odd in ("x", [1], 3, {"2": "x"}, float("inf"), float("nan"), 10**400, None, True):
        sources = {name: {**good, name: odd} for name in good} | {"whole": good, "odd": odd}
        (run / "eval/results.json").write_text(json.dumps({"models": {"m": sources, "o": odd}}))
        config = {"sfpo": {f"entropy_{k}": odd for k in ("window", "patience", "zscore_threshold")}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert report(run) == 0, odd
        cells = re.findall(r"<t[hd][^>]*>([^<]*)</t", (run / "report.html").read_text())
        at = cells.index("whole")
        assert cells[at + 1 : at + 6] == ["4", "2", "50.0 % ± 10.0 %", "–", "75.0 %"]


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run", num_steps=40, steps_done=0)
    (run / "metrics.jsonl").unlink()
    assert report(run) == 0
    text = (run / "report.html").read_text()
    assert "no train step yet" in text and "No evaluation yet." in text
    (shown,) = data_in(run / "report.html")["runs"]
    assert shown["train"] == {}


def test_where_it_was_started(tmp_path: Path) -> None:
    """Lines of the run itself alone; of one that was continued, all."""
    run = write_report_run(tmp_path / "run", num_steps=3)
    directory = RunDirectory.of(run)
    run_id = json.loads(directory.record.read_text())["run_id"]
    note_start(directory, run_id="another", after_step=0)
    note_start(directory, run_id=run_id, after_step=2)
    assert report(run) == 0
    header, *starts = rows_of(run / "report.html", "When")
    assert header == ["run", "started", "after step", "host"]
    assert [start[2] for start in starts] == ["0", "2"]
    rows = {name: values for name, *values in rows_of(run / "report.html", "Hardware")}
    assert rows["hardware"][0].startswith("8 x NVIDIA H100")
    assert f"{len(os.sched_getaffinity(0))} cores of" in rows["hardware"][1]
    assert rows["python"][1].count(".") == 2


# ---- several runs ---------------------------------------------------------------------------


def test_arms_and_the_cost_of_the_target(tmp_path: Path) -> None:
    """Against costs read from metrics.jsonl; the seed that never gets there is there."""
    runs = two_arms(tmp_path, num_steps=200)
    page = tmp_path / "report.html"
    assert report(*runs, "--target", "0.8", "--out", page) == 0
    costs = {}
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        there = [line["step"] for line in lines if line.get("eval/accuracy", 0) >= 0.8]
        costs[run.relative_to(tmp_path).as_posix()] = 256 * min(there) if there else None
    assert costs["grpo/2"] is None
    sfpo = sorted(cost for name, cost in costs.items() if name.startswith("sfpo") and cost)[1]
    grpo = sorted(cost for name, cost in costs.items() if name.startswith("grpo") and cost)[1]
    header, *rows = rows_of(page, "To reach 80.0 %")
    assert header[:4] == ["arm", "seeds there", "rollouts", "times fewer"]
    assert [row[:3] for row in rows] == [
        ["SFPO K=3 α=0.8", "3 of 3", f"{sfpo:,}"],
        ["GRPO", "2 of 3", f"{grpo:,}"],
    ]
    assert re.fullmatch(rf"{grpo / sfpo:.2f} \([\d.]+ to no bound\)", rows[0][3])
    assert rows[1][3] == "1 (baseline)"
    seeds = {row[0]: row for row in rows_of(page, "Each seed")}
    assert seeds["grpo/2"][2:4] == ["never so far", "> 51,200"]
    run = {row[0]: row for row in rows_of(page, "Runs")}["sfpo/0"]
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["time/step_s"] for line in lines if "time/step_s" in line]
    assert float(run[-1]) == pytest.approx(sum(seconds) / len(seconds), rel=1e-3)
    arms = data_in(page)["arms"]
    assert [(arm["name"], len(arm["runs"])) for arm in arms] == [("SFPO K=3 α=0.8", 3), ("GRPO", 3)]
    band = arms[0]["evals"]["accuracy"]
    assert all(
        low <= m <= high
        for low, m, high in zip(*(band[k] for k in ("low", "mean", "high")), strict=True)
    )


def test_a_target_is_chosen_and_said(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert report(*two_arms(tmp_path, num_steps=200), "--out", page) == 0
    text = page.read_text()
    assert "chosen by this report" in text
    assert 0.5 < data_in(page)["target"] < 0.95


def test_arms_as_they_are_given(tmp_path: Path) -> None:
    """`--arm` first, in its own order; the rest by settings."""
    a, b, c = (write_report_run(tmp_path / n, seed=i, num_steps=20) for i, n in enumerate("abc"))
    page = tmp_path / "report.html"
    assert report(c, "--arm", f"mine={b},{a}", "--out", page) == 0
    data = data_in(page)
    assert [run["name"] for run in data["runs"]] == ["b", "a", "c"]
    assert [(arm["name"], arm["runs"]) for arm in data["arms"]] == [
        ("mine", [0, 1]),
        ("SFPO K=3 α=0.8", [2]),
    ]


def test_what_differs_in_the_configs(tmp_path: Path) -> None:
    a = write_report_run(tmp_path / "a", num_steps=20)
    b = write_report_run(tmp_path / "b", num_steps=20, num_fast_passes=0, seed=3)
    page = tmp_path / "report.html"
    assert report(a, b, "--out", page) == 0
    assert {row[0]: row[1:] for row in rows_of(page, "Settings")} == {
        "key": ["a", "b"],
        "seed": ["0", "3"],
        "model.path": ['"warm_start-0/hf"', '"warm_start-3/hf"'],
        "sfpo.num_fast_passes": ["3", "0"],
    }


def test_runs_of_one_seed_are_said(tmp_path: Path) -> None:
    """They are alike, and no interval over them means what it says."""
    runs = [
        write_report_run(tmp_path / str(n), seed=seed, num_steps=20, model={"path": "m"})
        for n, seed in enumerate((7, 7, 8))
    ]
    page = tmp_path / "report.html"
    assert report(*runs, "--out", page) == 0
    assert "Several runs of SFPO K=3 α=0.8 have the same seed (7)" in page.read_text()
    assert report(*runs[1:], "--out", page) == 0
    assert "the same seed" not in page.read_text()


def test_ten_long_runs_are_below_two_megabytes(tmp_path: Path) -> None:
    """400 steps each, with all the metrics that the page draws, and sample rollouts."""
    page = tmp_path / "report.html"
    assert report(*two_arms(tmp_path, seeds=5, samples=40), "--out", page) == 0
    assert page.stat().st_size < 2_000_000
    assert [run["steps_a_row"] for run in data_in(page)["runs"]] == [1] * 10


def test_longer_runs_are_drawn_as_means(tmp_path: Path) -> None:
    """Each of as many steps in every run, so that the arms have common rows."""
    runs = [
        write_report_run(tmp_path / str(seed), seed=seed, num_steps=3000 - 500 * seed)
        for seed in range(2)
    ]
    page = tmp_path / "report.html"
    assert report(*runs, "--out", page) == 0
    data = data_in(page)
    assert [run["steps_a_row"] for run in data["runs"]] == [2, 2]
    (arm,) = data["arms"]
    assert arm["train"]["step"] == list(range(2, 2501, 2))
    rewards = [run["train"]["reward_smooth"] for run in data["runs"]]
    for row in (0, 700):
        low, high = (arm["train"]["reward_mean"][k][row] for k in ("low", "high"))
        assert [low, high] == pytest.approx(sorted(r[row] for r in rewards), rel=2e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "found no RUN"),
        (["nowhere"], "nowhere: found no such directory, expected the output_dir of a run"),
        (["empty"], "empty: found neither config.yaml nor metrics.jsonl"),
        (["run", "./run"], "found this run twice"),
        (["--arm", "run"], "--arm: found 'run', expected NAME=RUN,RUN"),
        (["--arm", "x=run", "--arm", "x=other"], "--arm x: found two arms of that name"),
        (["sft"], "sft: found a warm start"),
        (["run", "--out", "no/where.html"], "found no directory no, expected one"),
    ],
)
def test_what_cannot_be_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "sft"):
        write_report_run(tmp_path / name, num_steps=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sft/run.json").write_text('{"kind": "sft", "run_id": "a"}')
    assert report(*words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("target", ["0", "1.5", "80", "half", "nan"])
def test_targets_are_shares(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report("run", "--target", target)
    assert f"found '{target}', expected a share" in capsys.readouterr().err


# ---- texts that would do harm ---------------------------------------------------------------

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!-- <script>",
    "<img src=x onerror=alert(1)>",
    "\ud800 half a pair, \u2028 and a line that is none",
    "]]> & &lt; \" ' ` ${1}",
)


def test_texts_of_a_run_are_no_html(tmp_path: Path) -> None:
    """A rollout, an answer, a name of a run, of a model, of a setting: all come back as they were,
    and no tag of theirs is in the file."""
    responses = [{"text": text, "reward": 1.0, "answer": text} for text in HOSTILE]
    sample = {"step": 1, "prompt": HOSTILE[0], "responses": responses}
    run = write_report_run(tmp_path / "<b onclick=1>", num_steps=2, data={HOSTILE[0]: HOSTILE[2]})
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "eval").mkdir()
    figures = {"n": 1, "num_problems": 1, "accuracy": 1, "stderr": 0, "majority": 1, "pass_at": {}}
    results = {"models": {HOSTILE[0]: {HOSTILE[2]: figures}}, "differences": {}}
    (run / "eval/results.json").write_text(json.dumps(results))
    assert report(run) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<img" not in text and "<b onclick" not in text and "<!--" not in text
    (shown,) = data_in(run / "report.html")["runs"]
    (found,) = shown["samples"]
    assert [one["text"] for one in found["responses"]] == list(HOSTILE)
    assert found["prompt"] == HOSTILE[0]
    assert [row[0] for row in rows_of(run / "report.html", "sfpo-megatron eval")][1:] == [
        HOSTILE[2]
    ]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """No address to load from, and a policy under which its own script alone may run."""
    run = write_report_run(tmp_path / "run", num_steps=2)
    assert report(run) == 0
    text = (run / "report.html").read_text()
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert all(one.startswith("#") or one == "data:," for one in addresses)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not re.search(r"<[a-z][^>]* (?:style|on[a-z]+)=", text)
