"""Five steps on two sources of different rewards: a server that goes away once, and a weighted sum.

Not exercised: a server on another machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import digits
import pytest
import yaml
from made.servers import send, serving


@pytest.mark.full
def test_each_source_is_scored_by_its_own_and_an_outage_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = digits.write_config(
        tmp_path,
        digits.make_model(tmp_path / "model"),
        parallel={"tensor": 1},
        train={"num_steps": 5, "prompts_per_step": 8, "group_size": 4},
    )
    tree = yaml.safe_load(config.read_text())
    (sums,) = tree["data"]["train"]
    doubles = [{"prompt": f"{a}={a}+", "answer": "0"} for a in range(8)]
    (tmp_path / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in doubles))
    other = {"source": "jsonl", "path": str(tmp_path / "doubles.jsonl")}
    weighted = [{"name": "last_number", "weight": 0.5}, {"name": "format", "weight": 0.1}]
    tree["data"]["train"] = [{**sums, "reward": weighted}, {**other, "reward": "http"}]

    def lengths(handler: Any, asked: Any) -> None:
        scores = [{"reward": len(r) / 100, "length": len(r)} for r in asked["responses"]]
        send(handler, json.dumps(scores).encode())

    def closes(handler: Any, asked: Any) -> None:
        """Without a word."""

    with serving(closes, closes, otherwise=lengths) as server:
        tree["reward"]["http"] = {"url": server.url, "retries": 4}
        config.write_text(yaml.safe_dump(tree))
        output = digits.train(config)
    assert "pauses and asks again" in output + (tmp_path / "run/logs/controller.log").read_text()
    asked = {prompt["id"].partition("/")[0] for one in server.asked for prompt in one["prompts"]}
    assert asked == {"doubles"}, "another source's prompts"
    assert {p["answer"] for one in server.asked for p in one["prompts"]} == {"0"}
    steps, _ = digits.read_metrics(tmp_path / "run")
    assert len(steps) == 5
    seen: set[str] = set()
    for step in steps:
        seen |= {name for name in step if name.startswith("reward/")}
        assert 0 <= step["reward_mean"] <= 0.6
    assert seen == {"reward/last_number", "reward/format", "reward/length"}
