"""One file a family: what `families.known` finds, and that nothing else has to know a new one.

Not exercised: Megatron's model of it (tests/dist/test_logits.py runs the families that are there).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.family import DEFAULTS, Family
from sfpo_megatron.families.known import FAMILIES, SUPPORTED_ARCHITECTURES, families_of
from sfpo_megatron.families.operations import cut, join, merge, split
from sfpo_megatron.families.shape import ModelShape, UnsupportedModel, model_shape
from sfpo_megatron.families.table import hf_shapes, rule_by_name, rules_of
from sfpo_megatron.planner.memory import num_params
from sfpo_megatron.planner.params import Chunk, Spec, params_of

KNOWN = Path(__file__).parents[2] / "sfpo_megatron" / "families" / "known"
CONFIG: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "vocab_size": 101,
}
NORMED = '''
"""A made-up family: Llama's layer with norms of queries and keys, and windows in every layer."""

from sfpo_megatron.families import windows
from sfpo_megatron.families.family import Family
from sfpo_megatron.families.known import llama, qwen3

FAMILY = Family(
    name="normed",
    architectures=("NormedForCausalLM", "OldNormedForCausalLM"),
    layer=(*llama.LAYER, *qwen3.QK_NORMS),
    windowed=windows.every_layer,
    defaults={"rms_norm_eps": 1e-3},
)
'''


def made(folder: Path, text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family of a file that lies in a package of its own."""
    package = folder / f"package_of_{name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    (family,) = families_of(package.name, [str(package)]).values()
    return family


@pytest.fixture
def normed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelShape:
    """The shape of a model of a family that one new file brought."""
    family = made(tmp_path, NORMED, "normed", monkeypatch)
    monkeypatch.setitem(FAMILIES, family.name, family)
    for architecture in family.architectures:
        monkeypatch.setitem(SUPPORTED_ARCHITECTURES, architecture, family.name)
    config = {k: v for k, v in CONFIG.items() if k != "rms_norm_eps"}
    return model_shape(config | {"architectures": ["NormedForCausalLM"], "sliding_window": 5})


def test_every_file_is_found_under_its_name() -> None:
    files = sorted(path.stem for path in KNOWN.glob("*.py") if path.stem != "__init__")
    assert list(FAMILIES) == files == [family.name for family in FAMILIES.values()]
    assert set(SUPPORTED_ARCHITECTURES.values()) == set(files)


def test_traits_of_a_new_family(normed: ModelShape) -> None:
    """Those of Llama but for what the record says; a default of its own is not the common one."""
    llama = model_shape({**CONFIG, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-3})
    assert DEFAULTS["rms_norm_eps"] != 1e-3
    assert normed == replace(llama, family="normed", qk_norm=True, window=5, windowed=(True,) * 3)
    older = {**CONFIG, "architectures": ["OldNormedForCausalLM"], "sliding_window": 5}
    assert model_shape(older).norm_eps == CONFIG["rms_norm_eps"]


def test_names_of_a_new_family(normed: ModelShape) -> None:
    """Every tensor once, each taken apart and put together again bit for bit."""
    names = [name for rule in rules_of(normed) for name in rule.hf]
    assert len(set(names)) == len(names) == 2 + 3 * (9 + 2)  # tied: no head
    assert "model.layers.2.self_attn.k_norm.weight" in names
    assert rule_by_name(normed)["output_layer.weight"].hf == ("model.embed_tokens.weight",)
    for rule in rules_of(normed):
        random = torch.Generator().manual_seed(0)
        parts = [torch.randn(size, generator=random) for size in hf_shapes(rule, normed)]
        whole = merge(rule, parts, normed)
        shards = [cut(rule, whole, normed, rank=rank, size=2) for rank in range(2)]
        for got, wanted in zip(split(rule, join(rule, shards), normed), parts, strict=True):
            assert torch.equal(got, wanted), rule.megatron


@pytest.mark.parametrize(
    ("spec", "first"), [("te", "linear_proj.weight"), ("local", "linear_qkv.layer_norm_weight")]
)
def test_the_planner_counts_a_new_family(normed: ModelShape, spec: Spec, first: str) -> None:
    """The order of Megatron's modules: of those of Qwen3, whose layer has the same tensors."""
    qwen3 = model_shape({**CONFIG, "architectures": ["Qwen3ForCausalLM"]})
    sizes = [size for rule in rules_of(normed) for size in hf_shapes(rule, normed)]
    assert num_params(normed) == sum(math.prod(size) for size in sizes)
    chunk, parallel = Chunk(layers=(0, 1), first=True, last=False), ParallelConfig(tensor=2)
    params = params_of(normed, parallel, chunk, spec)
    assert params == params_of(qwen3, parallel, chunk, spec)
    assert params[1].name.endswith(first) and params[-1].name.endswith("linear_fc2.weight")


def test_a_file_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="x: found no FAMILY, expected a record"):
        made(tmp_path, "FAMILY = 'normed'\n", "x", monkeypatch)


def test_two_families_of_one_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_two"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text(NORMED)
    (package / "two.py").write_text(NORMED.replace('"normed"', '"other"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"two: found 'NormedForCausalLM', which is .*\.one's"):
        families_of(package.name, [str(package)])


def test_a_llama_with_windows_is_refused() -> None:
    """Its classes have none, so a config.json that asks for them is another model's."""
    types = ["sliding_attention", "full_attention", "full_attention"]
    config = {**CONFIG, "architectures": ["LlamaForCausalLM"], "layer_types": types}
    with pytest.raises(UnsupportedModel, match="sliding-window attention in a Llama"):
        model_shape(config)
