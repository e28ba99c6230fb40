"""A sink that raises what is no ordinary exception is left out like any other that fails."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from made.configs import run_config

from sfpo_megatron.tracking.sinks import RunInfo
from sfpo_megatron.tracking.tracker import Tracker


class Mute(Exception):
    """Fails where its text is asked for."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Leaving:
    """A sink of a user's that raises what the test says."""

    raised: ClassVar[BaseException] = RuntimeError()

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def log(self, metrics: Any) -> None:
        raise self.raised

    def text(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SystemExit(0), "SystemExit: 0"),  # it would end a run with code 0
        (asyncio.CancelledError("a client's task"), "CancelledError: a client's task"),
        (Mute(), "Mute: its text cannot be had"),
    ],
)
def test_it_is_named_and_left_out(
    raised: BaseException,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Leaving, "raised", raised)
    name = f"{__name__}:Leaving"
    config = run_config(output_dir=str(tmp_path), tracking={"sinks": (name, "jsonl")})
    with Tracker(config) as tracker:
        tracker.log({"step": 1})
        tracker.log({"step": 2})
    logged = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2]
    said = capsys.readouterr().err
    assert said == f"warning: tracking.sinks: {name} failed and gets nothing more ({told})\n"
