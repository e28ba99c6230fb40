"""tests/full.py in a repository of its own: what has passed is not run again, on any machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from full import WORKER, digests, main

PASSES = "def test_a(): open('ran', 'a').write({name!r} + ' ')\n"
FAILS = "def test_a(): assert 0\n"
MUTANTS = """\
import pytest
@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_is_noticed(name): open('ran', 'a').write(name + ' ')
"""
TABLE = """\
[[mutant]]
name = "one"
[[mutant]]
name = "two"
survives = "nobody can see it"
[[mutant]]
name = "three"
"""


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # thirty pytests that need none
    files = {
        "tests/unit/test_u.py": PASSES.format(name="u"),
        "tests/slurm/test_s.py": PASSES.format(name="s"),
        "tests/dist/test_d.py": PASSES.format(name="d"),
        "tests/e2e/test_e.py": PASSES.format(name="e"),
        "tests/mutants/test_mutants.py": MUTANTS,
        "tests/mutants/table.toml": TABLE,
        "benchmarks/results/other.json": "{}",
        ".gitignore": "ran\n.cache\n__pycache__\n",
        "pyproject.toml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-q", "-m", "m")


def ran(root: Path) -> list[str]:
    """What ran since the last question."""
    file = root / "ran"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def result(root: Path) -> dict[str, Any]:
    return json.loads((root / "benchmarks/results/test_full.json").read_text())


def test_everything_once_and_slurm_alone_at_the_end(root: Path) -> None:
    assert main(["--jobs", "1"], root) == 0
    assert ran(root) == ["d", "one", "three", "u", "e", "s"]
    assert (result(root)["features"], result(root)["missing"]) == (["test-full"], 0)
    commit(root)  # the results are no code
    assert main([], root) == 0 and ran(root) == []
    (root / "Makefile").write_text("")
    commit(root)
    assert main(["--jobs", "1"], root) == 0
    assert ran(root) == ["d", "u", "e", "s"], "other code: all but the mutants again"


def test_another_test_is_other_code_for_unit_tests_alone(root: Path) -> None:
    """They may read any file; no file of tests imports another."""
    assert main([], root) == 0 and len(ran(root)) == 6
    (root / "tests/dist/test_d.py").write_text(PASSES.format(name="d2"))
    (root / "tests/mutants/table.toml").write_text(TABLE.replace('"three"', '"three"\nafter = ""'))
    commit(root)
    assert main(["--jobs", "1"], root) == 0 and ran(root) == ["d2", "three", "u"]


def test_a_mutant_runs_again_with_the_test_that_notices_it(root: Path) -> None:
    noticed = TABLE.replace('"one"', '"one"\nnoticed_by = "e2e/test_e.py::test_a"')
    (root / "tests/mutants/table.toml").write_text(noticed)
    commit(root)
    assert main([], root) == 0 and len(ran(root)) == 6
    (root / "tests/e2e/test_e.py").write_text(PASSES.format(name="e2"))
    commit(root)
    assert main(["--jobs", "1"], root) == 0 and ran(root) == ["one", "u", "e2"]


def test_a_failure_runs_again_and_what_is_left_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "tests/dist/test_d.py").write_text(FAILS)
    commit(root)
    assert main([], root) == 1
    assert sorted(ran(root)) == ["e", "one", "s", "three", "u"]
    found = result(root)
    assert (found["features"], found["missing"]) == ([], 1)
    assert "tests/dist/test_d.py: 0 passed, 1 failed, 0 skipped" in capsys.readouterr().out
    assert main([], root) == 1 and ran(root) == []


def test_a_sitting_goes_on_elsewhere(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert main(["tests/e2e", "tests/unit/test_u.py"], root) == 1  # the others are left
    assert sorted(ran(root)) == ["e", "u"] and result(root)["missing"] == 4
    assert main(["--minutes", "0"], root) == 1 and ran(root) == []
    commit(root)
    other = tmp_path_factory.mktemp("other") / "clone"
    git(root, "clone", "-q", str(root), str(other))
    assert main([], other) == 0
    assert sorted(ran(other)) == ["d", "one", "s", "three"]


def test_figures_come_when_no_test_runs_any_more(root: Path) -> None:
    """Before, they would make a page stale that another test compares with them."""
    measures = """\
import json, os, pathlib
def test_a():
    folder = pathlib.Path(os.environ["FIGURES"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "other.json").write_text(json.dumps([1.5]))
"""
    looks = "def test_a(): assert open('benchmarks/results/other.json').read() == '{}'\n"
    (root / "tests/dist/test_d.py").write_text(measures)
    (root / "tests/slurm/test_s.py").write_text(looks)
    commit(root)
    assert main(["--jobs", "1"], root) == 0
    assert json.loads((root / "benchmarks/results/other.json").read_text()) == [1.5]


def test_a_changed_tree_is_refused(root: Path) -> None:
    (root / "benchmarks/results/other.json").write_text("[]")  # a figure that a test took
    (root / "tests/unit/test_new.py").write_text(FAILS)
    with pytest.raises(SystemExit, match=r"expected what is committed:\n\?\? tests/unit/test_new"):
        main([], root)


def test_one_that_is_killed_has_no_result(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kills = "import os\ndef test_a(): os.kill(os.getpid(), 9)\n"
    (root / "tests/dist/test_d.py").write_text(kills)
    commit(root)
    assert main(["tests/dist"], root) == 1
    assert "tests/dist/test_d.py: pytest ended with exit code -9" in capsys.readouterr().err
    assert not (root / "benchmarks/results/test_full.json").exists()


def test_a_test_on_ranks_depends_on_what_it_imports(root: Path) -> None:
    """Through other files, packages on the way and helpers included."""
    files = {
        **dict.fromkeys(WORKER, ""),
        "sfpo_megatron/__init__.py": "",
        "sfpo_megatron/mcore/__init__.py": "",
        "sfpo_megatron/mcore/deep.py": "",
        "sfpo_megatron/elsewhere.py": "",
        "tests/dist/harness.py": "def ranks():\n    import sfpo_megatron.mcore.deep",
        "tests/dist/test_d.py": "from harness import ranks\n" + PASSES.format(name="d"),
        "tests/dist/test_p.py": "import subprocess, harness\n" + PASSES.format(name="p"),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    commit(root)
    before = digests(root)
    for changed, expected in {
        "sfpo_megatron/elsewhere.py": False,
        "sfpo_megatron/mcore/deep.py": True,
        "sfpo_megatron/mcore/__init__.py": True,
        "tests/dist/harness.py": True,
        "tests/e2e/test_e.py": False,
    }.items():
        (root / changed).write_text("import harness\n")
        commit(root)
        after = digests(root)
        assert (after["tests/dist/test_d.py"] != before["tests/dist/test_d.py"]) == expected, (
            changed
        )
        is_other_test = changed.startswith("tests/e2e/")
        assert (after["tests/dist/test_p.py"] == before["tests/dist/test_p.py"]) == is_other_test
        before = after


def test_what_never_passed_runs_first_then_the_oldest(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sittings too short for all of it come round to every test."""
    assert main([], root) == 0
    file = root / "benchmarks/results/test_full.json"
    results = json.loads(file.read_text())
    for day, name in enumerate(("unit/test_u", "dist/test_d"), start=1):
        results["ran"][f"tests/{name}.py"]["at"] = f"2026-01-0{day}T00:00Z"
    del results["ran"]["tests/mutants/test_mutants.py::test_is_noticed[three]"]
    file.write_text(json.dumps(results))
    (root / "Makefile").write_text("")
    commit(root)
    ran(root)
    capsys.readouterr()
    assert main(["--minutes", "0"], root) == 1
    assert "5 left, 4 passed with earlier code, since 2026-01-01T00:00Z" in capsys.readouterr().out
    assert main(["--jobs", "1"], root) == 0
    assert ran(root) == ["three", "u", "d", "e", "s"]
