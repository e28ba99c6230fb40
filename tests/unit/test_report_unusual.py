"""What a report says of runs that are out of the ordinary, beside what it says of all."""

from __future__ import annotations

import json
import re
from pathlib import Path

from made.report_runs import write_report_run

from sfpo_megatron import cli


def test_a_run_that_went_on_from_anothers_checkpoint_says_what_its_costs_count(
    tmp_path: Path,
) -> None:
    whole, late = (write_report_run(tmp_path / name, num_steps=40) for name in ("whole", "late"))
    lines = (late / "metrics.jsonl").read_text().splitlines(keepends=True)
    (late / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["step"] > 10)
    )
    out = tmp_path / "both.html"
    assert cli.main(["report", str(whole), str(late), "--out", str(out)]) == 0
    said = "The lines of late begin at train step 11."
    assert said in out.read_text() and "The lines of whole" not in out.read_text()
    assert cli.main(["report", str(late)]) == 0 and said in (late / "report.html").read_text()


def test_a_two_sided_gate_is_drawn_as_one(tmp_path: Path) -> None:
    sfpo = {"num_fast_passes": 3, "alpha": 0.8, "entropy_window": 30}
    for trigger in ("one_sided", "two_sided"):
        run = write_report_run(tmp_path / trigger, num_steps=40, sfpo=sfpo | {"trigger": trigger})
        assert cli.main(["report", str(run)]) == 0
        page = (run / "report.html").read_text()
        (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
        (shown,) = json.loads(found)["runs"]
        is_two_sided = trigger == "two_sided"
        assert (shown["two_sided"], "low_bound" in shown["train"]) == (is_two_sided,) * 2
