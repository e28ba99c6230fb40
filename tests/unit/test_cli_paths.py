"""Paths of options: `~`, which a shell leaves in `--out=~/x`, and letters that YAML would read.

Not exercised: what the commands then do there.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
from made.configs import write_run

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.overrides import override_of
from sfpo_megatron.config.paths import escape, from_option
from tools import convert_hf_to_megatron

ODD = (
    *(
        "a b",
        "a: b",
        "a #b",
        "'a'",
        '"',
        "\\",
        "[a]",
        "{a}",
        "- a",
        "5",
        "1e3",
        "010",
        "yes",
        "null",
    ),
    *("2026-11-29", "$HOME", "$$", "~", "~x/y", "*a", "&a", "!a", "%a", "@a", "a=b", "é", "😀/漢"),
    *("a\u2028b", "a" * 200, "=", "|", ">", "?", ": ", "<<"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NAME", "elsewhere")
    return tmp_path / "home"


@pytest.mark.parametrize("path", ODD)
def test_every_path_comes_through_an_override(home: Path, path: str) -> None:
    """`eval --model` and `demo --run` hand them on like this."""
    config = load_config(write_run(), [override_of("output_dir", escape(path))])
    assert Path(config.output_dir) == Path(path)


@pytest.mark.parametrize(
    "value", [0, 1.5, 1e-6, True, None, "a, b", [1, "x"], {"a": {"b": [None]}}]
)
def test_every_plain_value_comes_through_an_override(home: Path, value: Any) -> None:
    settings = {"x": value}
    config = load_config(write_run(), [override_of("rollout.environment_args", settings)])
    assert config.rollout.environment_args == settings


def test_home_is_expanded_and_nothing_else(home: Path) -> None:
    assert from_option("~/x") == f"{home}/x" and from_option("~") == str(home)
    assert from_option("$NAME/~/x") == "$NAME/~/x" and from_option("./~") == "./~"
    for text in ("", "~nobody-of-that-name/x", "a\nb"):
        with pytest.raises(ArgumentTypeError, match=r"^found .*, expected "):
            from_option(text)


def test_options_of_commands(home: Path) -> None:
    given = cli.parse(["eval", "--model=~/m", "--data=math500, ~/a.jsonl,~/b.jsonl", "--out=~/o"])
    assert (given.model, given.out) == ([f"{home}/m"], f"{home}/o")
    assert given.data == f"math500,{home}/a.jsonl,{home}/b.jsonl"
    given = cli.parse(["report", "--arm", "A=~/a,b", "--out=~/r.html"])
    assert (given.arm, given.out) == ([f"A={home}/a,b"], f"{home}/r.html")
    assert cli.parse(["demo", "--run=~/d"]).run_dir == home / "d"


def test_options_of_tools(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_hf_to_megatron.main(["--hf=~/none", "--out=~/o"]) == 2
    assert f"error: {home}/none: found No such file" in capsys.readouterr().err
    assert not Path("~").exists()
