"""The tables in the docs that are made from code and from results, each between its markers.

    python tools/doc_tables.py        # writes them where they stand

docs/outputs.md has the metrics, from where they are declared. docs/processes.md has the layers,
from the tables that tests/unit/test_layering.py checks imports against; what a room is comes from
its docstring; and the environment variables of host/variables.py. examples/demo/README.md and
docs/images/demo.svg have the demo's accuracies, from benchmarks/results/demo.json;
docs/coming-from.md has a step beside TRL's, from vs_trl.json there. A unit test fails when one of
them is stale.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: its own folder is on the path, not the root

from sfpo_megatron.host.variables import table as variable_table  # noqa: E402
from sfpo_megatron.outputs import cost_metrics, metric_list  # noqa: E402
from sfpo_megatron.outputs.declared import table as metric_table  # noqa: E402
from tools import demo_curve  # noqa: E402

PACKAGE = ROOT / "sfpo_megatron"
LAYERING = ROOT / "tests/unit/test_layering.py"
DEMO = ROOT / "benchmarks/results/demo.json"
VS_TRL = ROOT / "benchmarks/results/vs_trl.json"


class Stale(ValueError):
    """A table cannot be made: which file, what was found, what to do."""


def pages() -> dict[Path, str]:
    """Each page that has a table, and the demo's picture, as they should be."""
    result = json.loads(DEMO.read_text(encoding="utf-8"))
    tables = {
        ("docs/outputs.md", "train-step"): metric_table(metric_list.TRAIN_STEP),
        ("docs/outputs.md", "costs"): metric_table(cost_metrics.COSTS),
        ("docs/outputs.md", "evaluation"): metric_table(metric_list.EVALUATION),
        ("docs/outputs.md", "warm-start"): metric_table(metric_list.WARM_START),
        ("docs/processes.md", "layers"): layers(),
        ("docs/processes.md", "variables"): variable_table(),
        ("examples/demo/README.md", "demo"): demo(result),
        ("docs/coming-from.md", "beside-trl"): beside_trl(json.loads(VS_TRL.read_text("utf-8"))),
    }
    found = {ROOT / "docs/images/demo.svg": demo_curve.svg(result)}
    for (page, name), made in tables.items():
        text = found.get(ROOT / page) or (ROOT / page).read_text(encoding="utf-8")
        found[ROOT / page] = with_table(text, name, made, page=page)
    return found


def with_table(text: str, name: str, table: str, *, page: str) -> str:
    """`text` with `table` between `<!-- NAME: ... -->` and `<!-- /NAME -->`."""
    marked = re.compile(rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)", flags=re.S)
    found = len(marked.findall(text))
    if found != 1:
        raise Stale(f"{page}: found {found} times <!-- {name}: --> to <!-- /{name} -->, expected 1")
    return marked.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)


# ---- TRL ------------------------------------------------------------------------------------


def beside_trl(result: dict[str, Any]) -> str:
    """Seconds a step in each case, then seconds to an accuracy, and what they were made with."""
    rows = [
        "| A train step | TRL, s | here, s | TRL / here | aimed at | passes, of peak | TRL's |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        cells = (
            case["says"],
            f"{case['trl_s']:.2f}",
            f"{case['ours_s']:.2f}",
            f"{case['ratio']:.2f}",
            f"{case['least_ratio']:g}",
            f"{case['passes_of_peak']:.0%}",
            f"{case['trl_passes_of_peak']:.0%}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| Until it answers equally well | Learning rate | Seconds |", "|---|---|---|"]
    for arm in result["accuracy_medians"]:
        passes = "one pass" if arm["sweeps"] == 1 else f"{arm['sweeps']} passes"
        who = f"TRL, {passes} over a batch" if arm["trainer"] == "TRL" else "SFPO, K = 3"
        told = "never" if arm["seconds"] is None else f"{arm['seconds']:.0f}"
        rows.append(f"| {who} | {arm['lr']:g} | {told}, median of {arm['seeds']} seeds |")
    peak = f"GEMM peak {result['gemm_flops'] / 1e9:.0f} GFLOP/s"
    versions = ", ".join(f"{name} {version}" for name, version in result["trl"].items())
    made = f"{result['hardware']}, {peak}, commit {result['commit'][:7]}, {versions}"
    return "\n".join([*rows, "", f"({made}.)"])


# ---- layers ---------------------------------------------------------------------------------


def layers() -> str:
    """A row for each room, highest layer first, and who may import what is heavy."""
    told = constants(LAYERING, "LAYER", "L1_ALLOWED", "OWNERS")
    rows = ["| Layer | Room | What it is |", "|---|---|---|"]
    for number in sorted(set(told["LAYER"].values()), reverse=True):
        for room in (room for room, layer in told["LAYER"].items() if layer == number):
            rows.append(f"| L{number} | {_link(room)} | {sentence(_file(room))} |")
    owners = [
        f"`{name}` in {' and '.join(f'`{place}`' for place in places)}"
        for name, places in told["OWNERS"].items()
    ]
    exceptions = [f"`{file}` imports `{room}/`" for file, room in sorted(told["L1_ALLOWED"])]
    return "\n".join(
        [
            *rows,
            "",
            f"Imported in these places only: {', '.join(owners)}.",
            f"From package to package in L1: {', '.join(exceptions)}.",
        ]
    )


def constants(file: Path, *names: str) -> dict[str, Any]:
    """Values of module-level constants, read without running the module."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            found[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    if missing := set(names) - set(found):
        raise Stale(
            f"{file.name}: found no {', '.join(sorted(missing))}; correct tools/doc_tables.py"
        )
    return found


def sentence(file: Path) -> str:
    """First sentence of a module's docstring, on one line and with a full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        raise Stale(
            f"{file.relative_to(ROOT)}: found no docstring, expected one that says its idea"
        )
    first = " ".join(docstring.split("\n\n")[0].split())
    return f"{re.split(r'[.:]?(?:$|[.] )', first)[0]}.".replace("|", "\\|")


def _file(room: str) -> Path:
    module = PACKAGE / f"{room}.py"
    return module if module.is_file() else PACKAGE / room / "__init__.py"


def _link(room: str) -> str:
    name = f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"
    return f"[`{name}`](../{PACKAGE.name}/{name})"


# ---- demo -----------------------------------------------------------------------------------


def demo(result: dict[str, Any]) -> str:
    """Held-out accuracy of each seed at the steps of its evaluations."""
    seeds = {
        name.removeprefix("seed "): run["held_out_accuracy"]
        for name, run in result.items()
        if name.startswith("seed ")
    }
    steps = list(next(iter(seeds.values())))
    lines = [f"| seed | step {' | '.join(steps)} |", f"|---{'|---' * len(steps)}|"]
    for seed, accuracy in seeds.items():
        lines.append(f"| {seed} | {' | '.join(f'{accuracy[step]:.3f}' for step in steps)} |")
    where = f"{result['hardware']}; commit {result['commit'][:7]}"
    return "\n".join([*lines, "", f"({where}: [demo.json](../../benchmarks/results/demo.json).)"])


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for path, page_text in pages().items():
        path.write_text(page_text, encoding="utf-8")
