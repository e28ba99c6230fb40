"""The architecture as tests: who may import whom, and how long a file or function may be.

Static imports only, those inside functions included: a lazy import crosses a layer all the same.
`TYPE_CHECKING` blocks count too.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import import_statements
from made.configs import write_run

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sfpo_megatron"

# Top-level module or package of sfpo_megatron -> layer. Imports go to the same layer or below.
# docs/processes.md shows this table: `python tools/doc_tables.py` writes it there.
LAYER = {
    "sfpo": 0, "gate": 0, "snapshots": 0, "types": 0, "batching": 0, "config": 0, "objectives": 0,
    "families": 0, "data": 0, "rewards": 0, "planner": 0, "checkpoints": 0, "host": 0, "outputs": 0,
    "errors": 0, "plugins": 0, "demo": 0, "sandbox": 0, "tools": 0,
    "mcore": 1, "convert": 1, "resharding": 1, "rollout": 1, "tracking": 1, "slurm": 1,
    "trainer": 2, "run": 2, "sft": 2, "evaluate": 2, "evaluation": 2,
    "cli": 3, "commands": 3, "__main__": 3, "launcher": 3, "doctor": 3,
}  # fmt: skip
# L1 packages do not import one another, but for this one; host/ imports no other room.
L1_ALLOWED = {("resharding/source.py", "mcore")}
# Who may import a heavy dependency: path prefixes inside the package.
OWNERS = {
    "megatron": ("mcore/",),
    "ray": ("rollout/",),
    "vllm": ("rollout/", "resharding/transports/"),
}
TORCH_FREE = (
    "config/",
    "planner/",
    "cli.py",
    "commands/report.py",
    "commands/check.py",
    "commands/install.py",
    "commands/demo.py",
    "commands/responses.py",
    "commands/score.py",
    "commands/starting.py",
    "__main__.py",
    "launcher/rank.py",
    "launcher/failures.py",
    "plugins.py",
    "errors.py",
    "outputs/",
    "host/",
    "sandbox/",
    "families/known/",
    *(f"families/{name}.py" for name in ("experts", "family", "hf_config", "mla", "moe")),
    *(f"families/{name}.py" for name in ("rope", "rule", "shape", "table", "windows")),
    *(
        f"families/{name}.py"
        for name in ("json_file", "safetensors_header", "weight_files", "weight_names")
    ),
    "checkpoints/",
)
MAX_PER_1000_LINES = {"object": 0.76, "Any": 8.0}
"""Lines whose types say nothing of a value: `Json` of types.py is one that was only read."""
MAX_IN_ALL = {"cast": 0, "type: ignore": 8}
MAX_FILE_LINES, MAX_RUN_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 400, 250, 200, 80

FILES = sorted(PACKAGE.rglob("*.py"))
BESIDE = ("tests", "tools", "benchmarks")
CHECKED = FILES + [f for folder in BESIDE for f in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` gives `a.b` as well as `a`."""
    for line, module, names in import_statements(path):
        yield line, module
        if module == "sfpo_megatron":
            yield from ((line, f"{module}.{name}") for name in names)


def layer_faults(path: Path) -> list[str]:
    """Imports of `path` that go upwards, or sideways between L1 packages."""
    inside = path.relative_to(PACKAGE)
    own = inside.parts[0].removesuffix(".py")
    if own == "__init__":  # lazy exports of everything
        return []
    assert own in LAYER, f"{own} has no layer: add it to LAYER and to the design"
    faults = []
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "sfpo_megatron" or len(parts) == 1 or parts[1] not in LAYER:
            continue
        other = parts[1]
        sideways = LAYER[own] == LAYER[other] == 1 and own != other
        if LAYER[other] > LAYER[own] or (sideways and (name(path), other) not in L1_ALLOWED):
            faults.append(f"{name(path)}:{line}: {own} (L{LAYER[own]}) imports {module}")
        elif own == "host" != other:
            faults.append(f"{name(path)}:{line}: host imports {module}; it imports no other room")
    return faults


def dependency_faults(path: Path) -> list[str]:
    """Imports of `path` that belong to other packages."""
    faults = []
    for line, module in imports(path):
        top = module.split(".")[0]
        if top in OWNERS and not name(path).startswith(OWNERS[top]):
            faults.append(f"{name(path)}:{line}: imports {module}; only {OWNERS[top]} may")
        if top in ("torch", "transformers", "numpy") and name(path).startswith(TORCH_FREE):
            faults.append(f"{name(path)}:{line}: imports {module}; it must stay torch-free")
    return faults


def untyped(text: str) -> Counter[str]:
    """Lines with `object` and with `Any` as a type, calls of `cast` and comments `type: ignore`."""
    nodes = list(ast.walk(ast.parse(text)))
    owners = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    names = [node for node in nodes if isinstance(node, ast.Name) and node not in owners]
    lines = {(node.id, node.lineno) for node in names if node.id in MAX_PER_1000_LINES}
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    found = Counter(name for name, _ in lines)
    found["cast"] = sum(call in ("cast", "typing.cast") for call in calls)
    found["type: ignore"] = sum("type: ignore" in comment for comment in comments)
    return found


def test_every_room_has_a_layer() -> None:
    """No more and no less: what has moved away is not in the table."""
    inside = [f for f in PACKAGE.iterdir() if f.suffix == ".py" or (f / "__init__.py").exists()]
    assert sorted(LAYER) == sorted({f.stem for f in inside} - {"__init__"})


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_downwards(path: Path) -> None:
    assert not layer_faults(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heavy_dependencies_have_owners(path: Path) -> None:
    assert not dependency_faults(path)


@pytest.mark.parametrize("path", CHECKED, ids=name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    is_of_run = path.parent == PACKAGE / "run"
    assert len(text.splitlines()) <= (MAX_RUN_FILE_LINES if is_of_run else MAX_FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and PACKAGE in path.parents:
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_CLASS_LINES, f"{node.name}: {length} lines"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


def test_types_say_what_values_are() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    found = sum(map(untyped, texts), Counter[str]())
    thousands = sum(len(text.splitlines()) for text in texts) / 1000
    for name, most in MAX_PER_1000_LINES.items():
        assert found[name] <= most * thousands, f"{found[name]} lines with {name} as a type"
    for name, most in MAX_IN_ALL.items():
        assert found[name] <= most, f"{found[name]} times {name}"


def test_what_says_nothing_of_a_value_is_counted() -> None:
    text = """
def f(x: object, y: dict[str, object], z: Any) -> Any:
    object.__setattr__(x, "object", cast(int, y) or typing.cast("Any", z))
    return "type: ignore"  # type: ignore[arg-type]
"""
    assert untyped(text) == {"object": 1, "Any": 1, "cast": 2, "type: ignore": 1}


@pytest.mark.parametrize("path", [f for f in FILES if f.read_text().strip()], ids=name)
def test_every_file_says_its_idea(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no docstring"


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("mcore/x.py", "def f():\n    from sfpo_megatron.trainer import run", "mcore (L1) imports"),
        ("mcore/x.py", "from sfpo_megatron import rollout", "imports sfpo_megatron.rollout"),
        ("rollout/x.py", "import megatron.core", "only ('mcore/',) may"),
        ("config/x.py", "import torch", "torch-free"),
        ("host/x.py", "from sfpo_megatron.outputs.directory import x", "host imports"),
    ],
)
def test_the_checks_find_faults(
    file: str, code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rule above fails on a file that breaks it."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert expected in "\n".join(layer_faults(path) + dependency_faults(path))


HEAVY = {"torch", "megatron", "vllm", "ray", "transformers", "numpy", "matplotlib"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["demo", "--help"],
        ["check", "CONFIG"],
        ["plan", "--help"],
        ["score", "FILE"],
        ["report", "RUN"],
        ["install", "cpu", "--dry-run"],
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    """`-X importtime` lists every module that was imported, on stderr."""
    config = write_run(tmp_path, output_dir=f"{tmp_path}/run", model={"path": "owner/name"})
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"response": "42", "answer": "42"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "num_rollouts": 8, "loss": 0.5}\n')
    files = {
        "CONFIG": [str(config)],
        "FILE": [str(responses), "--reward", "exact_match"],
        "RUN": [str(tmp_path / "run")],
    }
    arguments = [word for a in arguments for word in files.get(a, [a])]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sfpo_megatron", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr[-500:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert "sfpo_megatron" in imported, "importtime was not read as it is written"
    assert not imported & HEAVY
