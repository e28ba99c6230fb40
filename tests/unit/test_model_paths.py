"""model.path and the JSON files in it: what is not there, and what is there in their place.

Not exercised here: weight files (test_model_files.py), the contents of config.json
(test_families*.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from made.model_files import POINTER, checked

from sfpo_megatron import cli

CONFIG_JSON: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "bom": (b'\xef\xbb\xbf{"a": 1}', ("a byte-order mark (BOM)", "UTF-8")),
    "utf_16": ('{"a": 1}'.encode("utf-16"), ("a byte-order mark (BOM)", "UTF-8")),
    "not_json": (b"{'a': 1}", ("valid JSON",)),
    "cut_off": (b'{"a": ', ("valid JSON",)),
    "a_list": (b"[1]", ("found a list, not an object",)),
    "a_number": (b"1", ("found a int, not an object",)),
    "empty": (b"", ("an empty file",)),
    "pointer": (POINTER, ("a git-lfs pointer", "git lfs pull")),
    "web_page": (b"\n<html>", ("a web page",)),
    "latin_1": ('{"a": "é"}'.encode("latin-1"), ("valid JSON",)),
    "remote_code": (
        b'{"architectures": ["MyForCausalLM"], "auto_map": {"AutoModelForCausalLM": "my.My"}}',
        ("architecture MyForCausalLM with code of its own (auto_map)", "LlamaForCausalLM"),
    ),
    "other_weights": (
        b'{"architectures": ["LlamaForCausalLM"], "transformers_weights": "x.safetensors"}',
        ("transformers_weights 'x.safetensors'",),
    ),
}


@pytest.mark.parametrize("name", CONFIG_JSON)
def test_config_json(model: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data, words = CONFIG_JSON[name]
    (model / "config.json").write_bytes(data)
    code, err = checked(capsys)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("error: run.yaml: model.path: found ")
    assert all(word in line for word in (*words, "model/config.json")), line


def test_config_json_is_not_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").unlink()
    assert "no config.json in 'model'" in checked(capsys)[1]
    (model / "adapter_config.json").write_text("{}")
    assert "an adapter (adapter_config.json), not a model, in 'model'" in checked(capsys)[1]
    (model / "config.json").symlink_to("none")
    assert "a link to nothing at model/config.json" in checked(capsys)[1]


PATHS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "./none": (2, ("no directory './none' in",), ("hub id",)),
    "/none": (2, ("no directory '/none',",), ("hub id",)),
    "./~none": (2, ("no directory './~none' in",), ("hub id",)),
    "a/b/c": (2, ("no directory 'a/b/c' in",), ("hub id",)),
    "runs/demo/warm_start/hf": (2, ("make it first: `sfpo-megatron demo` does",), ("tiny",)),
    "./runs/demo/hf": (2, ("make it first: `sfpo-megatron demo` does",), ("tiny",)),
    "runs/a/warm_start/hf/": (
        2, ("sft CONFIG output_dir=runs/a/warm_start model.path=MODEL`",), ("tiny",)),
    "runs/a/hf": (2, ("wait for the run in 'runs/a', which writes it",), ("tiny",)),
    "runs/a/model": (2, ("make_tiny_model.py makes a small random one",), ("hub id",)),
    "none/": (2, ("no directory 'none/' in",), ("hub id",)),
    "model/none": (2, ("no directory 'model/none' in",), ("hub id",)),
    "my model": (2, ("no directory 'my model' in",), ("hub id",)),
    ".hidden/none": (2, ("no directory '.hidden/none' in",), ("hub id",)),
    "owner/name": (0, ("no directory 'owner/name' in", "the hub id 'owner/name'"), ()),
    "gpt2": (0, ("no directory 'gpt2' in", "the hub id 'gpt2'"), ()),
    "broken": (2, ("a link to nothing at 'broken' (-> model/none)",), ("hub id",)),
    "model/config.json": (2, ("a file, not a directory, at 'model/config.json'",), ("hub id",)),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_to_nothing_is_said_to_be_one(
    model: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """Two-part names are read both ways; `train` and `plan` refuse those too."""
    Path("broken").symlink_to("model/none")
    code, words, absent = PATHS[path]
    found, err = checked(capsys, f"model.path={path}")
    assert found == code
    assert all(word in err for word in words) and not any(word in err for word in absent), err
    for command in ("train", "plan"):
        assert cli.main([command, "run.yaml", f"model.path={path}"]) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words), err
