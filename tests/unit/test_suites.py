"""The result that whole suites leave, from junit files that pytest itself has written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.suites import main

PASSES = "def test_a(): pass\n"
FAILS = "import pytest\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no GPU')\n"


def run_suite(folder: Path, name: str, code: str) -> None:
    (folder / f"test_{name}.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={folder / name}.xml"]
    subprocess.run([*command, f"test_{name}.py"], cwd=folder, capture_output=True, timeout=60)


def test_a_failure_is_counted_and_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIGURES", str(tmp_path / "results"))
    arguments = ("whole", "mcore-latest", str(tmp_path))
    run_suite(tmp_path, "unit", PASSES)
    main(arguments)
    result = json.loads((tmp_path / "results/whole.json").read_text())
    seconds = result["suites"]["unit"].pop("seconds")
    assert seconds >= 0 and result["suites"] == {"unit": {"passed": 1, "failed": 0, "skipped": 0}}
    assert result["features"] == ["mcore-latest"] and "megatron-core" in result["versions"]
    (tmp_path / "more").mkdir()
    run_suite(tmp_path / "more", "dist", PASSES + FAILS)
    main(arguments)
    result = json.loads((tmp_path / "results/whole.json").read_text())
    del result["suites"]["more/dist"]["seconds"]
    assert result["suites"]["more/dist"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert result["features"] == []
