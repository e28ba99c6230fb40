"""Checkpoints and runs of which a file is broken: the converters and inspect name it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from made.hf import make_hf

from sfpo_megatron.checkpoints.store import CheckpointError, pointed_at
from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.convert.inspect import describe
from sfpo_megatron.convert.locate import hf_files, locate
from sfpo_megatron.convert.to_hf import megatron_to_hf
from sfpo_megatron.convert.to_megatron import hf_to_megatron
from tools import convert_hf_to_megatron, make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("hf") / "model", dtype=torch.float32)


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    hf_to_megatron(model, tmp_path / "run", ParallelConfig())
    return tmp_path / "run"


@pytest.mark.parametrize(
    "content", [b"a: [", b"[]", b"model: 5", b"model: {}", b"model: {path: 5}", b"\xff", b""]
)
def test_a_runs_config_without_a_model(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "hf").rename(checkpoint / "away")
    (checkpoint / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml: found no model\.path .*--hf"):
        hf_files(locate(checkpoint))


def test_a_runs_model_that_is_elsewhere(checkpoint: Path) -> None:
    """The path is relative, and the converter is started in another folder."""
    (checkpoint / "hf").rename(checkpoint / "away")
    (checkpoint / "config.yaml").write_text("model: {path: gone}")
    with pytest.raises(CheckpointError, match=r"config\.yaml: found model\.path 'gone' .*--hf"):
        hf_files(locate(checkpoint))


@pytest.mark.parametrize(
    ("name", "text", "other"),
    [
        (".metadata", b"decoder", b"\xffecoder"),
        (".metadata", b"\x80", b"\x82"),
        (".metadata", b"storage_data", b"storage_dada"),
        ("__0_0.distcp", b"data.pkl", b"\xffata.pkl"),
    ],
)
def test_flipped_bytes_are_named(checkpoint: Path, name: str, text: bytes, other: bytes) -> None:
    """Readers of pickles and of zip files run into anything."""
    file = checkpoint / "release" / name
    whole = file.read_bytes()
    assert text in whole
    file.write_bytes(whole.replace(text, other))
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: ")):
        megatron_to_hf(checkpoint, checkpoint.parent / "back")
    assert not (checkpoint.parent / "back").exists()


def test_links_to_nothing_are_left_out_by_name(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are a pruned cache's, or an editor's lock."""
    (checkpoint / "hf" / "merges.txt").symlink_to("../blobs/none")
    (checkpoint / "hf" / ".#config.json").symlink_to(".#config.json")
    megatron_to_hf(checkpoint, tmp_path / "back")
    assert "left out, links to nothing: .#config.json, merges.txt" in caplog.text
    names = {file.name for file in (tmp_path / "back").iterdir()}
    assert "config.json" in names and not names & {"merges.txt", ".#config.json"}


def test_files_beside_the_tensors(checkpoint: Path) -> None:
    """What can be said is said all the same."""
    release = checkpoint / "release"
    whole = (release / "common.pt").read_bytes()
    for content in (b"", whole.replace(b"data.pkl", b"\xffata.pkl"), whole[:-9]):
        (release / "common.pt").write_bytes(content)
        assert "not read" in dict(describe(checkpoint))["common.pt"]
    for content in ('{"step"', "[1]", "5"):
        (release / "run_state.json").write_text(content)
        found = dict(describe(checkpoint))
        assert "run_state.json: found no JSON object" in found["run state"] and found["weights"]


def test_a_pointer_that_is_no_text(checkpoint: Path) -> None:
    (checkpoint / "latest").write_bytes(b"\xff\xfe")
    assert pointed_at(checkpoint) == checkpoint / "\ufffd\ufffd"
    with pytest.raises(CheckpointError, match="found no torch_dist checkpoint"):
        locate(checkpoint)


def test_a_value_of_config_json_says_what_was_expected(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that another family would do, which is of no help."""
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "hidden_size": "x"}))
    arguments = ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]
    assert convert_hf_to_megatron.main(arguments) == 2
    said = capsys.readouterr().err
    assert "hidden_size = 'x', expected a positive integer" in said
    assert "restore" in said and "Qwen2ForCausalLM" not in said


def test_a_tiny_model_of_no_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tmp_path / "none.yaml")
    assert make_tiny_model.main(["--out", str(tmp_path / "m"), "--config", config]) == 2
    assert capsys.readouterr().err.startswith(f"error: {config}: ")
