"""RunDirectory: its paths, and that nobody else puts them together."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron.outputs import directory as module
from sfpo_megatron.outputs.directory import RunDirectory

ROOT = Path(__file__).parents[2]
FILES = [
    file
    for folder in ("sfpo_megatron", "tools", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != Path(module.__file__)
]
NAMES = {
    *("metrics.jsonl", "eval.jsonl", "plot.png", "hf", "checkpoints", "logs", "slurm"),
    *("stop-requested", "controller.log", ".lock", ".lock-heartbeat"),
    *("environment.jsonl", "report.html"),
}


def test_the_same_directory_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = RunDirectory.of("a b/./runs/x/")
    monkeypatch.chdir("/")
    assert absolute == RunDirectory.of(tmp_path / "a b" / "runs" / "x")
    assert RunDirectory.of(".").path == Path("/")
    paths = [
        getattr(absolute, name)
        for name, value in vars(RunDirectory).items()
        if isinstance(value, property)
    ]
    paths += [absolute.error_file(0), absolute.failure_file(0), absolute.exit_file(0)]
    paths += [absolute.engine_log(0), absolute.engine_log(1)]
    assert len(set(paths)) == len(paths) and all(p.is_relative_to(absolute.path) for p in paths)


def output_dir_uses(node: ast.AST) -> Iterator[ast.AST]:
    """Every `output_dir` in an expression that does not go through RunDirectory."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("RunDirectory"):
        return
    if "output_dir" in (getattr(node, "attr", None), getattr(node, "id", None)):
        yield node
    for inner in ast.iter_child_nodes(node):
        yield from output_dir_uses(inner)


def faults(source: str) -> list[int]:
    """Lines that join, resolve or expand an `output_dir`, or add the name of one of a run's files
    to a path, by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.Add):
            named = isinstance(node.right, ast.Constant) and node.right.value in NAMES
            if named or any(output_dir_uses(node.left)):
                found.append(node.lineno)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            by_hand = function == "Path" or function.startswith("os.path.")
            if by_hand and any(use for a in node.args for use in output_dir_uses(a)):
                found.append(node.lineno)
            if function.endswith("expanduser"):
                found.append(node.lineno)
        elif isinstance(node, ast.JoinedStr) and "/" in ast.unparse(node).replace("/bin", ""):
            values = [v for v in node.values if isinstance(v, ast.FormattedValue)]
            if any(use for v in values for use in output_dir_uses(v)):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_paths_of_a_run_come_from_run_directory(file: Path) -> None:
    assert not faults(file.read_text(encoding="utf-8")), "take it from outputs/directory.py"


@pytest.mark.parametrize(
    "code",
    [
        "Path(config.output_dir)", "Path(output_dir) / 'x'", "os.path.join(config.output_dir, 'x')",
        "f'{config.output_dir}/x'", "config.output_dir + '/x'", "out / 'metrics.jsonl'",
        "path.expanduser()", "os.path.expanduser(text)",
    ],
)  # fmt: skip
def test_the_rule_finds_what_is_joined_by_hand(code: str) -> None:
    assert faults(code)


def test_the_rule_lets_a_run_directory_through() -> None:
    assert not faults("RunDirectory.of(config.output_dir).logs / 'x'")
    assert not faults("f'{config.output_dir!r}, which is model.path'")
