"""The report in a real browser: nothing in the console, charts that are drawn and read by keys.

Not exercised: how it looks; PICTURES=DIR keeps a picture of each page to look at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, find_browser
from made.report_runs import write_report_run

from sfpo_megatron import cli

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine")
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, whose rollouts are hostile, of two arms, and of a run without a step."""
    folder = tmp_path_factory.mktemp("report")
    one = write_report_run(folder / "one", num_steps=120, gate_closes=80, samples=4)
    sample = {"step": 120, "prompt": HOSTILE, "responses": [{"text": HOSTILE, "reward": 0.0}]}
    with (one / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    none = write_report_run(folder / "none", steps_done=0)
    (none / "metrics.jsonl").unlink()
    arms = [
        str(write_report_run(folder / f"{name}/seed{s}", seed=s, num_fast_passes=k, pace=pace + s))
        for name, k, pace in (("sfpo", 3, 40.0), ("grpo", 0, 80.0))
        for s in range(3)
    ]
    found = {"one": folder / "one.html", "none": folder / "none.html", "arms": folder / "arms.html"}
    assert cli.main(["report", str(one), "--out", str(found["one"])]) == 0
    assert cli.main(["report", str(none), "--out", str(found["none"])]) == 0
    assert cli.main(["report", *arms, "--out", str(found["arms"])]) == 0
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("name", ["one", "arms", "none"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_without_a_complaint(
    chromium: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    """Nothing is wider than the window; every drawing has a title, every table has headers."""
    chromium.complaints.clear()
    chromium.open(pages[name], width=width, dark=dark)
    if folder := os.environ.get("PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        chromium.picture(Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    assert chromium.complaints == []
    assert chromium.value("document.documentElement.scrollWidth") <= width
    drawn = chromium.value("document.querySelectorAll('svg').length")
    assert drawn >= {"one": 12, "arms": 18, "none": 0}[name]
    assert chromium.value("document.querySelectorAll('svg > title').length") == drawn
    headed = (
        "t => t.caption && t.querySelector('th[scope=col]') && t.querySelector('th[scope=row]')"
    )
    assert chromium.value(f"[...document.querySelectorAll('table')].every({headed})")
    broken = "p => /NaN|undefined/.test(p.getAttribute('d') ?? p.getAttribute('points'))"
    assert not chromium.value(f"[...document.querySelectorAll('path, polygon')].some({broken})")


def test_everything_is_reached_by_keys(chromium: Browser, pages: dict[str, Path]) -> None:
    """Tab comes to every chart; arrows read its values, aloud too; an arrow chooses the axis."""
    chromium.open(pages["arms"], width=1280)
    plots = chromium.value("document.querySelectorAll('.plot[tabindex]').length")
    reached = set()
    for _ in range(250):
        chromium.press("Tab", 9)
        reached.add(
            chromium.value(
                "[...document.querySelectorAll('.plot[tabindex]')].indexOf(document.activeElement)"
            )
        )
    assert reached >= set(range(plots))
    chromium.value("document.querySelector('.plot').focus()")
    chromium.press("End", 35)
    said = chromium.value("document.querySelector('.chart [aria-live]').textContent")
    assert said.startswith("102,400 rollouts") and "SFPO K=3" in said and "GRPO" in said
    assert chromium.value("!document.querySelector('.tip').hidden")
    chromium.press("Escape", 27)
    assert chromium.value("document.querySelector('.tip').hidden")
    chromium.value("document.querySelector('input[name=axis]').focus()")
    chromium.press("ArrowRight", 39)
    assert "train steps" in chromium.value(
        "document.querySelector('#learning svg .label').textContent"
    )


def test_a_pointer_reads_a_chart_that_has_just_been_made(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    """In the same turn as the choice of the axis that makes it anew."""
    chromium.open(pages["arms"], width=1280)
    chromium.complaints.clear()
    said = chromium.value(
        "{document.querySelectorAll('input[name=axis]')[2].click();"
        "const plot = document.querySelector('#learning .plot');"
        "const box = plot.getBoundingClientRect();"
        "plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2}));"
        "document.querySelector('#learning .tip').textContent}"
    )
    assert "backward passes" in said and "SFPO K=3 α=0.8" in said
    assert chromium.complaints == []


@pytest.mark.parametrize(
    ("threshold", "relative", "said", "line"),
    [
        (3.0, None, "reaches mean + 3 standard deviations of the last 30 steps.", "(z = 3)"),
        (
            3.0,
            0.1,
            "mean + 3 standard deviations of the last 30 steps, or 10% above the mean.",
            "(z = 3, or 10% above the mean)",
        ),
        (None, 0.1, "The gate closes when the entropy reaches 10% above", "(10% above the mean)"),
        (None, None, "Entropy does not close the gate.", None),
    ],
)
def test_it_is_said_when_the_gate_closes(
    chromium: Browser,
    tmp_path: Path,
    threshold: float | None,
    relative: float | None,
    said: str,
    line: str | None,
) -> None:
    sfpo = {
        "num_fast_passes": 3,
        "entropy_zscore_threshold": threshold,
        "entropy_relative_threshold": relative,
    }
    run = write_report_run(tmp_path / "run", num_steps=40, sfpo=sfpo)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "run.html")]) == 0
    chromium.complaints.clear()
    chromium.open(tmp_path / "run.html", width=1280)
    text = chromium.value("document.querySelector('main').innerText")
    assert said in text and chromium.complaints == []
    assert "closes here" not in text if line is None else f"closes here {line}" in text


def test_a_run_is_chosen(chromium: Browser, pages: dict[str, Path]) -> None:
    """The sections of one run follow; a chart's data comes as a table when it is asked for."""
    chromium.open(pages["arms"], width=1280)
    chromium.value(
        "{const s = document.getElementById('run-choice'); s.value = '3'; "
        "s.dispatchEvent(new Event('change'))}"
    )
    chromium.settle()
    assert "There are no fast passes" in chromium.value(
        "document.getElementById('one-run').innerText"
    )
    rows = (
        "new Promise(r => {const d = document.querySelector('#one-run details'); d.open = true; "
        "setTimeout(() => r(d.querySelectorAll('tbody tr').length), 50)})"
    )
    assert chromium.value(rows) == 400


def test_a_rollout_does_not_run(chromium: Browser, pages: dict[str, Path]) -> None:
    """It is shown as its characters."""
    chromium.open(pages["one"], width=1280)
    assert chromium.value("document.title") == "Run one"
    texts = "[...document.querySelectorAll('#sample-list pre')].map(p => p.textContent)"
    assert chromium.value(texts).count(HOSTILE) == 2
    assert chromium.value("document.querySelectorAll('#sample-list img').length") == 0
