"""Model directories as downloads leave them: what is broken is named, what is whole loads.

Not exercised here: engines' own loading (tests/e2e/test_model_files.py), the contents of
config.json (test_families_*.py).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made.model_files import (
    INDEX,
    POINTER,
    SHARDS,
    checked,
    random_tensors,
    write_config,
    write_index,
    write_single,
)
from safetensors.torch import load_file, save_file

from sfpo_megatron.families.hf_files import HFCheckpoint
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.families.weight_files import weight_files
from sfpo_megatron.resharding.transports.tensor_names import ManifestError, read_checkpoint_shapes
from tools import convert_hf_to_megatron

ONE, TWO = SHARDS
TENSORS = random_tensors()


def load(model: Path) -> dict[str, torch.Tensor]:
    source = HFCheckpoint(model, model_shape(read_hf_config(model)))
    return {name: source[name] for name in TENSORS}


# ---- broken --------------------------------------------------------------------------------------


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(file: Path, header: bytes, rest: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + rest)


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        header, rest = header_of(model / TWO)
        change(header)
        put_header(model / TWO, json.dumps(header).encode(), rest)

    return make


def replaced(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(data) and None


def cut(by: Callable[[int], int]) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        data = (model / TWO).read_bytes()
        (model / TWO).write_bytes(data[: by(len(data))])

    return make


def shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The second shard with other tensors under the old index."""

    def make(model: Path) -> None:
        tensors = load_file(model / TWO)
        change(tensors)
        save_file(tensors, model / TWO)

    return make


def with_map(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        weight_map = json.loads((model / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(model, weight_map)

    return make


def older_index(model: Path) -> None:
    write_single(model, random_tensors(1))


def stale_index(model: Path) -> None:
    older_index(model)
    for name in SHARDS:
        (model / name).unlink()


def index_names_both(model: Path) -> None:
    (model / ONE).rename(model / "model.safetensors")
    with_map(lambda m: m.update({n: "model.safetensors" for n in m if m[n] == ONE}))(model)


def link_to_nothing(model: Path) -> None:
    (model / TWO).unlink()
    (model / TWO).symlink_to("../blobs/none")


def a_folder(model: Path) -> None:
    (model / TWO).unlink()
    (model / TWO).mkdir()


def a_pipe(name: str) -> Callable[[Path], None]:
    """Whoever opens it waits for a writer."""

    def make(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return make


def no_index(model: Path) -> None:
    (model / INDEX).unlink()
    (model / TWO).unlink()


def two_sets(model: Path) -> None:
    (model / INDEX).unlink()
    write_single(model, TENSORS)
    (model / "model.safetensors").rename(model / "other.safetensors")


def tied_with_a_head_of_its_own(model: Path) -> None:
    write_config(model, tie_word_embeddings=True)


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    name = "model.layers.1.mlp.down_proj.weight"
    return shard(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


NAME = "model.layers.1.mlp.down_proj.weight"
AT = "data_offsets"
BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    # another version beside it
    "older_index": (older_index, ("both model.safetensors and", INDEX, ONE)),
    "stale_index": (stale_index, ("both model.safetensors and", INDEX, ONE)),
    "index_names_both": (index_names_both, ("both model.safetensors and", INDEX, TWO)),
    "tensor_in_two_files": (
        shard(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(37, 64)})),
        ("model.embed_tokens.weight", ONE, TWO, "one file"),
    ),
    "two_sets_without_index": (two_sets, (TWO, "other.safetensors", "one file")),
    "index_of_another_version": (with_map(lambda m: m.update(x=ONE)), ("no x in", ONE, INDEX)),
    "tensor_is_elsewhere": (
        with_map(lambda m: m.update({NAME: ONE})), (f"no {NAME} in", ONE, INDEX),
    ),
    "shard_without_the_tensor": (shard(lambda t: t.pop(NAME)), (f"no {NAME} in", TWO, INDEX)),
    # not the file
    "empty": (replaced(TWO, b""), ("an empty file", TWO, "again")),
    "pointer": (replaced(TWO, POINTER), ("a git-lfs pointer", TWO, "git lfs pull")),
    "pointer_for_the_index": (replaced(INDEX, POINTER), ("a git-lfs pointer", INDEX)),
    "pointer_for_the_tokenizer": (
        replaced("tokenizer.json", POINTER), ("a git-lfs pointer", "tokenizer.json"),
    ),
    "xet_pointer": (replaced(TWO, b"# xet version 0\nfilesize = 3\n"), ("git-xet", TWO)),
    "web_page": (replaced(TWO, b"<!DOCTYPE html><html>404"), ("a web page", TWO)),
    "error_in_json": (replaced(TWO, b'{"error":"Invalid credentials"}'), ("JSON text", TWO)),
    "error_in_text": (replaced(TWO, b"Entry not found"), ("no safetensors header", TWO)),
    "pickle": (replaced(TWO, b"PK\x03\x04" + bytes(99)), ("a PyTorch pickle", TWO)),
    "zeros": (replaced(TWO, bytes(4096)), ("zeros", TWO)),
    "link_to_nothing": (link_to_nothing, ("a link to nothing", TWO)),
    "a_pipe_for_the_tokenizer": (a_pipe("tokenizer.json"), ("a pipe", "tokenizer.json")),
    "a_pipe": (a_pipe(TWO), ("a pipe", TWO)),
    "a_pipe_for_the_index": (a_pipe(INDEX), ("a pipe", INDEX)),
    "a_folder": (a_folder, ("Is a directory", TWO)),
    # cut off, or changed
    "truncated": (cut(lambda n: n - 1), ("a truncated file", TWO, "bytes as its header says")),
    "truncated_in_the_header": (cut(lambda n: 100), ("a truncated file", TWO)),
    "truncated_in_the_length": (cut(lambda n: 5), ("no safetensors header", TWO)),
    "bytes_behind": (
        lambda m: (m / TWO).open("ab").write(b"\0" * 8) and None, ("bytes at", TWO, "header says"),
    ),
    "header_is_no_json": (
        lambda m: put_header(m / TWO, b"{" + b"x" * 63, bytes(8)), ("not JSON", TWO),
    ),
    "header_in_latin_1": (
        lambda m: put_header(m / TWO, '{"é": 1}'.encode("latin-1"), b""), ("not JSON", TWO),
    ),
    "overlapping": (
        with_header(lambda h: h[NAME].update({AT: [x - 4 for x in h[NAME][AT]]})), ("data", TWO),
    ),
    "out_of_the_file": (
        with_header(lambda h: h[NAME].update({AT: [x + 10**9 for x in h[NAME][AT]]})),
        ("a hole in the data", TWO),
    ),
    "shape_beside_bytes": (with_header(lambda h: h[NAME].update(shape=[64, 31])), (NAME, TWO)),
    "negative_size": (
        with_header(lambda h: h[NAME].update(shape=[-64, -32])), ("a header with sizes", NAME, TWO),
    ),
    "no_dtype": (with_header(lambda h: h[NAME].pop("dtype")), (NAME, TWO)),
    "dtype_unknown": (with_header(lambda h: h[NAME].update(dtype="F99")), ("'F99'", TWO)),
    # another model
    "fp8": (cast(torch.float8_e4m3fn), (NAME, "F8_E4M3", TWO, "quantization")),
    "int8": (cast(torch.int8), (NAME, "I8", TWO, "quantization")),
    "boolean": (cast(torch.bool), (NAME, "BOOL", TWO)),
    "scales": (
        shard(lambda t: t.update({f"{NAME}_scale_inv": torch.ones(1, 1)})),
        (f"unknown tensors for a llama model: {NAME}_scale_inv", "quantization"),
    ),
    "unmerged_adapter": (
        shard(lambda t: t.update({NAME.replace("weight", "lora_A.weight"): torch.ones(1)})),
        ("unknown tensors", "lora_A", "merge"),
    ),
    "another_size": (
        shard(lambda t: t.update({NAME: torch.zeros(64, 33)})),
        (NAME, "(64, 33)", TWO, "(64, 32)", "config.json"),
    ),
    "layers_of_another": (
        lambda m: write_config(m, num_hidden_layers=3), ("missing tensors", "model.layers.2."),
    ),
    "tied_with_a_head_of_its_own": (
        tied_with_a_head_of_its_own, ("lm_head.weight that is not model.embed_tokens.weight", TWO),
    ),
    # not there
    "missing_shard": (lambda m: (m / TWO).unlink(), ("1 of 2 weight files missing", TWO, INDEX)),
    "renamed_shard": (
        lambda m: (m / TWO).rename(m / "b.safetensors") and None, ("1 of 2 weight files", TWO),
    ),
    "missing_shard_without_index": (no_index, ("1 of 2 weight files missing", TWO)),
    # the index itself
    "index_is_no_json": (replaced(INDEX, b"weights"), (INDEX, "valid JSON")),
    "index_with_bom": (
        lambda m: (m / INDEX).write_bytes(b"\xef\xbb\xbf" + (m / INDEX).read_bytes()) and None,
        (INDEX, "BOM"),
    ),
    "index_is_a_list": (replaced(INDEX, b"[]"), (INDEX, "a list", "weight_map")),
    "index_is_empty": (replaced(INDEX, b""), ("an empty file", INDEX)),
    "index_without_map": (replaced(INDEX, b'{"metadata": {}}'), (INDEX, "weight_map")),
    "index_of_nothing": (replaced(INDEX, b'{"weight_map": {}}'), ("an empty weight_map", INDEX)),
    "index_of_numbers": (replaced(INDEX, b'{"weight_map": {"x": 1}}'), ("x: 1", INDEX)),
    "index_leads_out": (
        with_map(lambda m: m.update(x="../x.safetensors")), ("../x", INDEX, "beside the index"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_check_names_the_file(model: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """One line with file, found, expected and what to do; loading says the same."""
    make, words = BROKEN[name]
    make(model)
    code, err = checked(capsys)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("error: run.yaml: model.path: found "), err
    assert all(word in line for word in (*words, "expected", "; ")), line
    if "tokenizer" in name:
        return
    with pytest.raises(ValueError, match="expected") as caught:
        load(model)
    assert all(word in str(caught.value) for word in words)


LISTING = ("older_index", "tensor_in_two_files", "truncated", "pointer", "missing_shard")


@pytest.mark.parametrize("name", LISTING)
def test_the_refits_list_is_the_same(model: Path, name: str) -> None:
    make, words = BROKEN[name]
    make(model)
    with pytest.raises(ManifestError) as caught:
        read_checkpoint_shapes(model)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["older_index", "truncated"])
def test_the_converter_reads_the_same(
    model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, words = BROKEN[name]
    make(model)
    assert convert_hf_to_megatron.main(["--hf", "model", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model: found ") and all(word in line for word in words)
    assert not Path("out").exists()


def test_nothing_is_there_yet(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index without its files, as on a login node: a warning, but an error for a run."""
    for name in SHARDS:
        (model / name).unlink()
    code, err = checked(capsys)
    assert code == 0 and "warning: run.yaml: model.path: found 2 of 2 weight files missing" in err
    code, err = checked(capsys, "--world-size", "1")
    assert code == 2 and f"({ONE}...)" in err


# ---- whole ---------------------------------------------------------------------------------------


def extra(name: str, data: bytes = b"not read") -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(data)

    return make


def single(model: Path) -> None:
    for name in (*SHARDS, INDEX):
        (model / name).unlink()
    write_single(model, TENSORS)


def single_beside(*names: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        single(model)
        for name in names:
            extra(name)(model)

    return make


def single_with_its_index(model: Path) -> None:
    single(model)
    write_index(model, dict.fromkeys(TENSORS, "model.safetensors"))


WHOLE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "shards": (lambda m: None, ()),
    "single": (single, ()),
    "single_with_its_index": (single_with_its_index, ()),
    "shards_without_index": (lambda m: (m / INDEX).unlink(), ()),
    "links": (lambda m: (m / TWO).rename(m / "b") and (m / TWO).symlink_to("b"), ()),
    "consolidated": (extra("consolidated.safetensors"), ("consolidated.safetensors",)),
    "adapter": (extra("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    "pickles": (extra("pytorch_model.bin"), ("pytorch_model.bin",)),
    "original": (extra("original/consolidated.00.pth"), ("original/",)),
    "old_shard": (extra("model-00003-of-00003.safetensors"), ("model-00003-of-00003",)),
    "single_consolidated": (single_beside("consolidated.safetensors"), ("consolidated",)),
    "single_adapter": (single_beside("adapter_model.safetensors"), ("adapter_model",)),
    "single_and_fp16": (single_beside("model.fp16.safetensors"), ("model.fp16.safetensors",)),
    "single_and_old_shards": (single_beside(*SHARDS), SHARDS),
    "hidden_without_index": (
        lambda m: (m / INDEX).unlink() or extra("._model.safetensors")(m), ("._model",),
    ),
    "consolidated_shards_without_index": (
        lambda m: (m / INDEX).unlink() or extra("consolidated-00001-of-00003.safetensors")(m),
        ("consolidated-00001-of-00003.safetensors",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_loads(model: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Bit for bit; other files are left alone with one line."""
    make, left_alone = WHOLE[name]
    make(model)
    code, err = checked(capsys, "--world-size", "1")
    assert code == 0, err
    lines = [line for line in err.splitlines() if "model.path" in line]
    assert len(lines) == bool(left_alone) and all(word in err for word in left_alone)
    found = load(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_checkpoint_shapes(model) == {n: tuple(t.shape) for n, t in TENSORS.items()}


def test_two_hundred_shards_are_read_by_their_headers(model: Path) -> None:
    """Files of 1 GiB each without a byte in them: whoever read them would not come back."""
    (model / INDEX).unlink()
    names = [f"model-{n + 1:05d}-of-00200.safetensors" for n in range(200)]
    for name in names:
        header = {name: {"dtype": "BF16", "shape": [2**29], "data_offsets": [0, 2**30]}}
        put_header(model / name, json.dumps(header).encode(), b"")
        os.truncate(model / name, (model / name).stat().st_size + 2**30)
    for name in SHARDS:
        (model / name).unlink()
    assert len(weight_files(model).tensors()) == 200
