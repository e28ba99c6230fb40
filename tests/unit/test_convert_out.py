"""The converters' --out where it holds what is read, or what others have written."""

from __future__ import annotations

from pathlib import Path

import pytest
from made.hf import make_hf

from tools import convert_hf_to_megatron, convert_megatron_to_hf


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, run = make_hf(tmp_path / "m"), tmp_path / "x"
    to_megatron, to_hf = convert_hf_to_megatron.main, convert_megatron_to_hf.main
    assert to_megatron(["--hf", str(hf), "--out", str(run / "checkpoints")]) == 0
    (run / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for flags in ([], ["--overwrite"]):
        assert to_megatron(["--hf", str(hf), "--out", str(hf), *flags]) == 2
        assert "is the input" in capsys.readouterr().err
        arguments = ["--checkpoint", str(run / "checkpoints"), "--out", str(run), *flags]
        assert to_hf(arguments) == 2
        assert "contains the input" in capsys.readouterr().err
    assert contents(tmp_path) == before
