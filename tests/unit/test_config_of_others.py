"""RUN/config.yaml is the run's own: one that somebody has written or edited is not lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made.configs import run_config

from sfpo_megatron.config.load import dump_config, is_dumped
from sfpo_megatron.config.rules.files import outputs
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.continuing import prepare_output

MINE = "# what I tried on Monday\nseed: 3\n"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return replace(run_config(), output_dir=str(tmp_path))


def found(config: RunConfig) -> list[str]:
    return [problem.found for problem in outputs(config)]


def test_what_a_run_writes_is_known(config: RunConfig, tmp_path: Path) -> None:
    """Another version's too, which had other keys."""
    file = tmp_path / "config.yaml"
    text = dump_config(config)
    for ours in ("", text, text.replace("seed: 0\n", "seed: 5\nolder: null\n")):
        file.write_text(ours)
        assert is_dumped(file)
    spaced = text.replace("seed: 0", "seed:  0")
    for other in (MINE, text + "# mine\n", "seed: 3\n", "{", spaced):
        file.write_text(other)
        assert not is_dumped(file)
    assert not is_dumped(tmp_path / "none")


def test_a_config_that_no_run_has_written_is_refused(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(MINE)
    assert found(config) == [f"{str(file)!r}, which no run has written"]
    file.write_text(dump_config(config))
    assert found(config) == []


def test_an_edited_config_is_kept(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next start of a run that has been there is not refused for it."""
    file = prepare_output(config).config
    RunDirectory.of(config.output_dir).logs.mkdir()
    prepare_output(config)
    assert [path.name for path in tmp_path.glob("config*")] == ["config.yaml"]
    edited = file.read_text() + "# the best one so far\n"
    file.write_text(edited)
    assert found(config) == []
    prepare_output(config)
    assert file.read_text() == dump_config(config)
    assert (tmp_path / "config.yaml.previous-1").read_text() == edited
    assert "kept as config.yaml.previous-1" in capsys.readouterr().err
