"""The page: one HTML file that needs no other and no network.

Its security policy names the hash of its own script and style, and nothing else may run or be
loaded: not even a text of a rollout that had got past the escaping.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from importlib.resources import files

from sfpo_megatron import __version__
from sfpo_megatron.outputs.report.curves import AXES
from sfpo_megatron.outputs.report.document import Document, Target, to_json
from sfpo_megatron.outputs.report.html import Markup, element, joined, text
from sfpo_megatron.outputs.report.tables import (
    arms_table,
    begun_late,
    config_tables,
    count,
    duration,
    end_of,
    environment_tables,
    evaluations,
    gate_said,
    percent,
    runs_table,
    target_tables,
)

_MOST_CHARS = 80
GENERATOR = "sfpo-megatron report"
"""The name in the page by which a later report knows that it may replace the file."""

_AXIS_NAMES = {"rollouts": "rollouts", "seconds": "seconds", "passes": "backward passes"}

_NO_TARGET = (
    "None can be chosen: an arm has no evaluation, or half of its seeds have not come above where "
    "all began. --target takes one."
)


def page(document: Document) -> str:
    """The whole file. Characters that UTF-8 cannot have are written as references."""
    assets = files("sfpo_megatron.outputs.report").joinpath("assets")
    style = assets.joinpath("report.css").read_text(encoding="utf-8")
    script = "".join(
        assets.joinpath(name).read_text(encoding="utf-8")
        for name in ("charts.js", "bars.js", "page.js")
    )
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    title = _title(document)
    sections = list(_sections(document))
    body = joined(
        element("a", text("Skip to the content"), class_="skip", href="#content"),
        element("header", element("h1", text(title)), element("p", text(_subtitle(document)))),
        _navigation(sections),
        element("main", *(_section(*one) for one in sections), id="content"),
        element("footer", element("p", text(_footer()))),
    )
    whole = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{GENERATOR}">\n<link rel="icon" href="data:,">\n'
        f"{element('title', text(title))}\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{to_json(document)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
    return whole.encode("utf-8", "xmlcharrefreplace").decode("utf-8")


def _hash(code: str) -> str:
    digest = hashlib.sha256(code.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _title(document: Document) -> str:
    if len(document.runs) == 1:
        return f"Run {document.runs[0].name}"
    if len(document.arms) == 1:
        return f"{document.arms[0].name}: {len(document.runs)} runs"
    title = " against ".join(arm.name for arm in document.arms)
    return title if len(title) <= _MOST_CHARS else f"{len(document.arms)} arms"


def _subtitle(document: Document) -> str:
    begun = [run for run in document.runs if run.last_step]
    parts = [] if len(document.runs) == 1 else [f"{len(document.runs)} runs"]
    if not begun:
        return ", ".join([*parts, "no train step yet"])
    if len(begun) < len(document.runs):
        parts.append(f"{len(document.runs) - len(begun)} without a train step yet")
    running = [run for run in begun if run.num_steps and run.last_step < run.num_steps]
    if len(document.runs) == 1:
        parts.append(document.arms[0].name)
        of = f" of {begun[0].num_steps:,}" if begun[0].num_steps else ""
        parts.append(f"{begun[0].last_step:,}{of} train steps")
    elif running:
        parts.append(f"{len(running)} before the last train step")
    return ", ".join(parts)


def _footer() -> str:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"Made by sfpo-megatron {__version__} on {when} from what the runs had written by then. "
        "This file needs no other and no network."
    )


Part = tuple[str, str, str, Markup]
"""Id, heading, lead, content of a section."""


def _sections(document: Document) -> Iterator[Part]:
    several = len(document.runs) > 1
    yield "summary", "Summary", "", _summary(document)
    yield "curves", "Learning", "", joined(_axis_choice(), _charts("learning"))
    if several:
        lead = "Means over the seeds of each arm."
        yield "arms", "Arms", lead, _charts("comparison")
    if document.target is not None:
        tables = joined(_charts("ratios"), target_tables(document, document.target))
        yield "target", "Cost of a target", _target_lead(document.target), tables
    elif several:
        yield "target", "Cost of a target", _NO_TARGET, joined()
    lead = "Entropy with the gate, drift by pass, seconds by phase, rollouts."
    yield (
        "run",
        "One run" if several else "In the run",
        lead,
        joined(_run_choice(document) if several else joined(), _charts("one-run")),
    )
    lead = "As they were generated and scored" + (", of the run chosen above." if several else ".")
    yield "samples", "Sample rollouts", lead, element("div", id="sample-list")
    yield "evaluations", "Evaluations", "", evaluations(document)
    yield "config", "Config", "", config_tables(document)
    yield "environment", "Environment", "", environment_tables(document)


def _section(name: str, heading: str, lead: str, content: Markup) -> Markup:
    parts = [element("h2", text(heading), id=f"{name}-heading")]
    if lead:
        parts.append(element("p", text(lead), class_="lead"))
    return element("section", *parts, content, id=name, aria_labelledby=f"{name}-heading")


def _navigation(sections: list[Part]) -> Markup:
    items = [element("li", element("a", text(one[1]), href=f"#{one[0]}")) for one in sections]
    return element("nav", element("ul", *items), aria_label="Sections")


def _charts(name: str) -> Markup:
    return joined(
        element("div", class_="charts", id=name),
        element("noscript", element("p", text("The charts need the script of this page."))),
    )


def _axis_choice() -> Markup:
    radios = []
    for axis in AXES:
        checked = " checked" if axis == AXES[0] else ""
        radio = Markup(f'<input type="radio" name="axis" value="{axis}"{checked}>')
        radios.append(
            element("label", radio, element("span", text(_AXIS_NAMES[axis])), class_="radio")
        )
    return element("fieldset", element("legend", text("against")), *radios)


def _run_choice(document: Document) -> Markup:
    options = [
        element("option", text(run.name), value=str(place))
        for place, run in enumerate(document.runs)
    ]
    label = element("label", text("Run "), for_="run-choice")
    return element("p", label, element("select", *options, id="run-choice"), class_="choice")


def _summary(document: Document) -> Markup:
    if len(document.runs) > 1:
        return joined(arms_table(document), runs_table(document), *begun_late(document))
    return joined(_tiles(document), *begun_late(document))


def _tiles(document: Document) -> Markup:
    (curves,) = document.curves
    accuracy = [value for value in curves.evals.get("accuracy", []) if value is not None]
    facts = {}
    if accuracy:
        facts["held-out accuracy"] = f"{percent(accuracy[0])} → {percent(accuracy[-1])}"
        facts["best"] = percent(max(accuracy))
    if curves.train:
        facts["rollouts"] = count(end_of(curves.train.get("rollouts")))
        facts["backward passes"] = count(end_of(curves.train.get("passes")))
        facts["train steps take"] = duration(end_of(curves.train.get("seconds")))
        facts["gate closed"] = gate_said(document.runs[0], curves)
    tiles = [
        element("li", element("span", text(name)), element("strong", text(value)))
        for name, value in facts.items()
    ]
    return element("ul", *tiles, class_="tiles") if tiles else joined()


def _target_lead(target: Target) -> str:
    how = (
        "chosen by this report: nine tenths of the gain that half of the seeds of every arm make"
        if target.is_chosen
        else "as given by --target"
    )
    return (
        f"Held-out accuracy of {percent(target.accuracy)}, {how}. A seed is there at its first "
        "evaluation at or above it; one that never is has an infinite cost and is not left out. "
        "Medians over seeds; 95 % intervals by bootstrap over seeds (10,000 resamples)."
    )
