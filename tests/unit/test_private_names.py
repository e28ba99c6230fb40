"""Every internal of Megatron-Core that mcore/ reaches into is listed in mcore/private_names.py.

Found in the sources, Megatron's and ours. Not exercised: that the names mean what we think
(tests/dist/test_private_names.py does); names that are also ours or torch's, which cannot be told
apart here; what a string built at run time names.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfpo_megatron.mcore.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parents[2]
MCORE = ROOT / "sfpo_megatron" / "mcore"
CONTRACTS = ROOT / "tests" / "dist" / "test_private_names.py"
# Where Megatron keeps the objects that mcore/ handles: optimizers, DDP and its buffers, layers.
MEGATRON_PARTS = ("optimizer", "distributed", "transformer", "tensor_parallel", "models/gpt")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)


def trees(folder: Path) -> Iterator[ast.Module]:
    for path in sorted(folder.rglob("*.py")):
        if "fsdp" not in path.parts:  # refused as a whole
            yield ast.parse(path.read_text(encoding="utf-8"))


def on_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (
        node.value.id in ("self", "cls")
    )  # fmt: skip


def set_on_self(tree: ast.AST) -> set[str]:
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and on_self(n)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}


def declared(tree: ast.AST) -> set[str]:
    """Functions, classes and annotated fields: of a config, they are public."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@functools.cache
def internals() -> set[str]:
    """What Megatron's objects keep for themselves: attributes set in methods, underscored names."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec and spec.submodule_search_locations
    core = Path(spec.submodule_search_locations[0])
    attributes, names = set(), declared(ast.parse((core / "model_parallel_config.py").read_text()))
    for part in MEGATRON_PARTS:
        assert (core / part).is_dir(), f"megatron.core has no {part}: look where it went"
        for tree in trees(core / part):
            attributes |= set_on_self(tree)
            names |= declared(tree)
    return (attributes - names) | {n for n in names if n.startswith("_") and n[:2] != "__"}


def used(tree: ast.AST) -> set[str]:
    """Attributes of anything but self, those named in a string, underscored imports of Megatron."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not on_self(node):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            *("getattr", "hasattr", "setattr"),
        ):
            names |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            names |= {a.name for a in node.names if a.name.startswith("_")}
    return names


@functools.cache
def ours_or_torchs() -> set[str]:
    names = set(dir(torch)) | set(dir(torch.Tensor)) | set(dir({})) | {"param_groups", "state"}
    for tree in trees(ROOT / "sfpo_megatron"):
        names |= set_on_self(tree) | declared(tree)
    return names | set(dir(torch.nn.Module())) | set(dir(torch.optim.Optimizer))


def unlisted(tree: ast.AST) -> list[str]:
    return sorted((used(tree) & internals()) - ours_or_torchs() - set(PRIVATE_NAMES))


def test_every_internal_that_is_used_is_listed() -> None:
    faults = {name for tree in trees(MCORE) for name in unlisted(tree)}
    assert not faults, f"list in mcore/private_names.py and hold in {CONTRACTS.name}: {faults}"


def test_every_listed_name_is_used() -> None:
    found = set().union(*(used(tree) for tree in trees(MCORE)))
    assert sorted(set(PRIVATE_NAMES) - found) == []


def test_every_listed_name_has_a_contract() -> None:
    """At least, tests/dist/test_private_names.py says the name; what it asserts is up to it."""
    contracts = ast.parse(CONTRACTS.read_text(encoding="utf-8"))
    strings = {n.value for n in ast.walk(contracts) if isinstance(n, ast.Constant)}
    assert sorted(set(PRIVATE_NAMES) - used(contracts) - strings) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("optimizer._build_gbuf_range_map(b)", ["_build_gbuf_range_map"]),
        ("self.optimizer.model_param_gbuf_map", ["model_param_gbuf_map"]),
        ("hasattr(group, 'next_param_gather_bucket_group')", ["next_param_gather_bucket_group"]),
        ("chunk.zero_grad_buffer(); config.bf16; self.model_param_gbuf_map", []),
    ],
)
def test_the_check_finds_faults(code: str, found: list[str]) -> None:
    """And takes neither public methods nor config fields for internals."""
    assert unlisted(ast.parse(code)) == found
