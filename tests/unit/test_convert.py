"""The converters on one process: every family there and back, and what is refused.

Megatron's own reader and writer stand on the other side in tests/dist/test_convert.py.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from made.hf import make_hf
from made.models import OF_EXPERTS, TINY, UNTIED
from safetensors.torch import load_file

from sfpo_megatron.checkpoints.store import CheckpointError
from sfpo_megatron.checkpoints.weight_keys import find, stacked
from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.convert.inspect import describe
from sfpo_megatron.convert.locate import locate
from sfpo_megatron.convert.to_hf import megatron_to_hf
from sfpo_megatron.convert.to_megatron import hf_to_megatron
from sfpo_megatron.convert.torch_dist import TorchDistReader, TorchDistWriter
from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES
from sfpo_megatron.families.operations import merge
from sfpo_megatron.families.rope import inverse_frequencies, rope_scaling
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.families.table import rules_of
from tools import convert_hf_to_megatron, convert_megatron_to_hf, inspect_checkpoint

ROOT = Path(__file__).parents[2]


def same(left: Path, right: Path) -> None:
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "hf")


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    hf_to_megatron(hf, tmp_path / "megatron", ParallelConfig(tensor=2))
    return tmp_path / "megatron"


@pytest.mark.parametrize(
    ("architecture", "tied"), sorted({*product(SUPPORTED_ARCHITECTURES, [True, False])} - {*UNTIED})
)
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 3, 3)])
def test_there_and_back(
    tmp_path: Path, architecture: str, tied: bool, layout: tuple[int, int, int]
) -> None:
    """bf16, an odd vocabulary padded at TP2; config.json keeps its bytes."""
    source = make_hf(tmp_path / "hf", architectures=[architecture], tie_word_embeddings=tied)
    tensor, pipeline, expert = layout
    if architecture not in OF_EXPERTS:
        expert = 1
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    hf_to_megatron(source, tmp_path / "megatron", parallel)
    embedding = TorchDistReader(tmp_path / "megatron/release").tensors[
        "embedding.word_embeddings.weight"
    ]
    assert embedding.shape[0] == (102 if tensor == 2 else 101)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    same(source / "model.safetensors", tmp_path / "back/model.safetensors")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()


def test_dtype_and_shards(megatron: Path, hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "back"
    megatron_to_hf(megatron, out, dtype=torch.float32, max_shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    original = load_file(hf / "model.safetensors")
    assert index["weight_map"].keys() == original.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], original[name].float())


def renamed(layout: str, name: str, whole: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if layout == "layers apart":
        place = stacked(name)
        expert = place.index[1:]
        key = name.replace(f"experts.experts.{expert[0]}.", "experts.experts.") if expert else name
        return [(key, whole)]
    if "linear_fc1.weight" in name:
        return [(f"{name}_{half}", part) for half, part in zip("wv", whole.chunk(2), strict=True)]
    return [(name, whole)]


@pytest.mark.parametrize("layout", ["layers apart", "everything apart"])
def test_other_keys_of_megatron(tmp_path: Path, layout: str) -> None:
    """Layers that differ have keys of their own; so have experts with singleton_local_shards."""
    source = make_hf(tmp_path / "hf", architectures=["Qwen3MoeForCausalLM"])
    shape = model_shape(read_hf_config(source))
    original = load_file(source / "model.safetensors")
    (tmp_path / "saved").mkdir()
    writer = TorchDistWriter(tmp_path / "saved")
    for rule in rules_of(shape):
        whole = merge(rule, [original[name] for name in rule.hf], shape)
        for key, part in renamed(layout, rule.megatron, whole):
            expert = stacked(rule.megatron).index[1:] if layout == "layers apart" else ()
            lead = (None,) * len(expert)
            start = (*expert, *([0] * part.dim()))
            writer.tensor(key, part[lead], offsets=start, shape=(*(3,) * len(expert), *part.shape))
    writer.tensor("optimizer.state.exp_avg.x", torch.ones(3), offsets=(0,), shape=(3,))
    writer.object("rng_state/shard_0_1", b"")
    writer.close({})
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", hf=source)
    same(source / "model.safetensors", tmp_path / "back/model.safetensors")


def test_a_chunk_in_several_pieces(tmp_path: Path) -> None:
    """Chunks of layers and rows in any cut; a missing one is named."""
    whole = torch.arange(24.0).view(2, 6, 2)
    writer = TorchDistWriter(tmp_path)
    writer.tensor("a", whole[:, :2], offsets=(0, 0, 0), shape=whole.shape)
    writer.tensor("a", whole[:1, 2:], offsets=(0, 2, 0), shape=whole.shape)
    writer.close({"iteration": 3})
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("a", (0,)), whole[0]) and reader.common() == {"iteration": 3}
    with pytest.raises(CheckpointError, match=r"a\[1\]: found chunks of 4 elements, expected 12"):
        reader.read("a", (1,))


def test_the_trainers_own_folder(megatron: Path, hf: Path, tmp_path: Path) -> None:
    """RUN/checkpoints/latest names the checkpoint, RUN/config.yaml the model."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (megatron / "release").rename(run / "checkpoints/step_0000050")
    (run / "checkpoints/step_0000050/run_state.json").write_text('{"gate": {"closed": true}}')
    (run / "checkpoints/latest").write_text("step_0000050\n")
    (run / "config.yaml").write_text(f"model: {{path: {hf}}}\n")
    for path in (run, run / "checkpoints", run / "checkpoints/step_0000050"):
        assert locate(path).kind == "native"
        megatron_to_hf(path, tmp_path / "back")
        same(hf / "model.safetensors", tmp_path / "back/model.safetensors")


# --- what is refused ---------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.pop(name)


def rename(name: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[other] = entries.pop(name)

    return change


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop(NORM), f"no key for {NORM}"),
        (rename(NORM, "decoder.last.weight"), f"no key for {NORM}"),
        (lambda entries: entries.update(odd=entries[NORM]), "no rule for key odd"),
    ],
)
def test_keys_without_rule_and_rules_without_key(
    megatron: Path, change: Callable[[dict[str, Any]], None], found: str
) -> None:
    path = megatron / "release/.metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301
    change(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=found):
        megatron_to_hf(megatron, megatron.parent / "back")
    assert not (megatron.parent / "back").exists()


def test_another_models_config(megatron: Path, tmp_path: Path) -> None:
    other = make_hf(tmp_path / "other", intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight: found shape .* expected"):
        megatron_to_hf(megatron, tmp_path / "back", hf=other)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch evil",))


def test_no_code_of_a_checkpoint_runs(
    megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for payload in (
        pickle.dumps(Evil()),
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.",
    ):
        (megatron / "release/.metadata").write_bytes(payload)
        with pytest.raises(CheckpointError, match=r"found .*system"):
            TorchDistReader(megatron / "release")
    assert not (tmp_path / "evil").exists()


def test_no_code_of_common_pt_runs(
    megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """inspect says that it was not read; the weights convert all the same."""
    monkeypatch.chdir(tmp_path)
    torch.save({"args": Evil()}, megatron / "release/common.pt")
    assert "not read" in dict(describe(megatron))["common.pt"]
    megatron_to_hf(megatron, tmp_path / "back")
    assert not (tmp_path / "evil").exists()


def test_a_truncated_file_is_named(megatron: Path, tmp_path: Path) -> None:
    """And an earlier result stays."""
    megatron_to_hf(megatron, tmp_path / "back")
    file = megatron / "release/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-30_000])
    before = (tmp_path / "back/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: .*the file is broken"):
        megatron_to_hf(megatron, tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == before


def test_a_flipped_bit_is_named(megatron: Path, tmp_path: Path) -> None:
    """torch.load takes it for another weight. Wherever it lies in a tensor's numbers."""
    file = megatron / "release/__0_0.distcp"
    whole = file.read_bytes()
    rows = TorchDistReader(megatron / "release").read("embedding.word_embeddings.weight")[:4]
    weight = rows.view(torch.uint8).numpy().tobytes()
    at = whole.index(weight)
    for place in (at, at + len(weight) // 2, at + len(weight) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp: embedding.*checksum"):
            megatron_to_hf(megatron, tmp_path / "back")
        assert not (tmp_path / "back").exists()
    file.write_bytes(whole)
    megatron_to_hf(megatron, tmp_path / "back")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no torch_dist checkpoint"):
        locate(tmp_path)


def test_layouts_that_do_not_fit(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--pp: found 2, expected a divisor of .*layers \(3\)"):
        hf_to_megatron(hf, tmp_path / "out", ParallelConfig(pipeline=2))


def test_find_names_what_is_missing(hf: Path) -> None:
    rule = rules_of(model_shape(read_hf_config(hf)))[1]
    assert find(rule, {}) is None
    place = stacked(rule.megatron)
    assert find(rule, {place.key}) == [place]


# --- tools -------------------------------------------------------------------------------------


def test_tools(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There, back, inspected, compared; then one weight is changed."""
    checkpoint, back = tmp_path / "m", tmp_path / "back"
    there = ["--hf", str(hf), "--out", str(checkpoint), "--tp", "2"]
    assert convert_hf_to_megatron.main(there) == 0
    arguments = ["--checkpoint", str(checkpoint), "--out", str(back), "--max-shard-size", "1MB"]
    assert convert_megatron_to_hf.main(arguments) == 0
    inspect = inspect_checkpoint.main
    assert inspect([str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "Megatron-LM checkpoint" in text and "tensor 2" in text and "bfloat16" in text
    assert inspect([str(checkpoint), "--diff", str(hf)]) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    weights = load_file(back / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    from safetensors.torch import save_file

    save_file(weights, back / "model.safetensors")
    assert inspect([str(checkpoint), "--diff", str(back)]) == 1
    assert "model.norm.weight: 1 of 48 differ, by 0.999 at most" in capsys.readouterr().out


def test_a_family_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without Megatron-Bridge: what is supported."""
    (tmp_path / "hf").mkdir()
    config = {**TINY, "architectures": ["GemmaForCausalLM"]}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    arguments = ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]
    assert convert_hf_to_megatron.main(arguments) == 2
    text = capsys.readouterr().err
    assert "GemmaForCausalLM" in text and "MistralForCausalLM" in text
    assert "Megatron-Bridge" in text


def test_manifest_is_checked(megatron: Path) -> None:
    """The manifest is the one that the trainer writes: size and sha256 of every file."""
    import hashlib

    directory = megatron / "release"
    files = {
        f.name: {
            "bytes": f.stat().st_size,
            "sha256": hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in directory.iterdir()
    }
    (directory / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": files}))
    assert ("manifest", "holds") in describe(directory)
    broken = directory / "common.pt"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    found = dict(describe(directory))["manifest"]
    assert "common.pt: found sha256" in found


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4,
        },
    ],
)
def test_rope_frequencies_are_transformers(parameters: dict[str, Any]) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**parameters, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters=parameters
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    scaling = rope_scaling({"rope_parameters": parameters})
    got = torch.tensor(inverse_frequencies(128, 500000.0, scaling))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert scaling is not None and factor == pytest.approx(scaling.attention_factor)


def test_models_of_unequal_tensors_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output layer of its own is the last tensor: all before it are the same."""
    tied = make_hf(tmp_path / "tied", tie_word_embeddings=True)
    own = make_hf(tmp_path / "own", tie_word_embeddings=False)
    for pair in ((tied, own), (own, tied)):
        assert inspect_checkpoint.main([str(pair[0]), "--diff", str(pair[1])]) == 2
        said = capsys.readouterr().err
        assert "lm_head.weight" in said and "expected the same tensors" in said
