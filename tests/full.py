"""Every test with its long matrices, in as many sittings and on as many machines as it takes.

    python tests/full.py [--minutes 60] [--jobs 2] [FILE ...]    (make test-full)

What passed is noted in benchmarks/results/test_full.json and not run again while its code is the
same: commit that file to go on elsewhere. A file of tests runs in a pytest of its own, a mutant
too; those of Slurm, whose own limits know no neighbours, alone and last.

The code of a unit test is everything, since it may read everything; of one on ranks what it
imports; of another all but other files of tests; of a mutant the two files that its row names.
What never passed runs first, then what has passed with other code, the oldest first: where a
sitting is too short for all of it, the next ones come round to the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file

import torch  # noqa: E402

from benchmarks.common.provenance import write  # noqa: E402
from benchmarks.common.suites import outcome  # noqa: E402
from tests.imports import closure, imports  # noqa: E402

CODE = (
    *("sfpo_megatron", "tests", "examples", "launch", "tools", "requirements"),
    *("Makefile", "pyproject.toml", "setup.py"),
    ":(exclude)examples/sfpo_vs_grpo/results",
    ":(exclude)tests/full.py",
)
"""What a test may depend on, as git takes it."""
MUTANTS = "tests/mutants/test_mutants.py"
WORKER = ("tests/conftest.py", "tests/dist/conftest.py", "tests/dist/worker.py")
FOUND = ("tests/te_standin/", "sfpo_megatron/families/", "requirements/", "pyproject.toml")
"""What they depend on besides, without a name of it being written anywhere."""
MUTANT = MUTANTS + "::test_is_noticed[{}]"
TABLE = "tests/mutants/table.toml"
RESULTS = "benchmarks/results"
FIGURES = ".cache/test-full/figures"
"""Folder for what tests measure: in RESULTS it would make pages of docs/ stale meanwhile."""
_ALONE = "tests/slurm/"
_WAITS = "tests/e2e/"
"""One of them beside one of the rest, as long as there are both."""


class Results:
    """What has run, when and with which code: `benchmarks/results/test_full.json`."""

    def __init__(self, root: Path, digests: Mapping[str, str]) -> None:
        self._root, self._digests = root, digests
        self._file = root / RESULTS / "test_full.json"
        found = json.loads(self._file.read_text())["ran"] if self._file.exists() else {}
        self._ran: dict[str, Any] = {name: found[name] for name in digests if name in found}

    def _passed(self, name: str) -> str:
        """When it passed, with whichever code; empty if it never did."""
        result = self._ran.get(name)
        return result["at"] if result and not result["failed"] else ""

    @property
    def missing(self) -> list[str]:
        """What has not passed with this code, in the order in which it should run."""
        found = [
            name
            for name, code in self._digests.items()
            if not self._passed(name) or self._ran[name]["code"] != code
        ]
        return sorted(found, key=self._passed)

    def add(self, name: str, counts: dict[str, int]) -> None:
        """Note it at once: the sitting may end at any moment."""
        now = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        commit = git(self._root, "rev-parse", "--short", "HEAD").strip()
        self._ran[name] = {**counts, "at": now, "commit": commit, "code": self._digests[name]}
        content = {"missing": len(self.missing), "ran": dict(sorted(self._ran.items()))}
        features = [] if self.missing else ["test-full"]
        write(self._file, content, device=torch.device("cpu"), features=features)

    def summary(self) -> str:
        """What is left, in a line."""
        left = self.missing
        if not left:
            return "all have passed with this code"
        earlier = [at for name in left if (at := self._passed(name))]
        told = f", {len(earlier)} passed with earlier code, since {min(earlier)}" if earlier else ""
        return f"{len(left)} left{told}"


def git(root: Path, *words: str, stdin: str | None = None) -> str:
    """What a git command says."""
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def code_of(root: Path) -> dict[str, str]:
    """The files of the code with what git calls their content. SystemExit if the tree differs."""
    paths = [path for path in CODE if path.startswith(":") or (root / path).exists()]
    if changed := git(root, "status", "--porcelain", "--", *paths):
        raise SystemExit(f"error: found changes, expected what is committed:\n{changed.rstrip()}")
    lines = git(root, "ls-files", "-s", *paths).splitlines()
    return {path: content for content, _, path in (line.partition("\t") for line in lines)}


def digests(root: Path) -> dict[str, str]:
    """What pytest is called with, files and mutants one by one, and its code."""
    code = code_of(root)
    tests = [path for path in code if path.startswith("tests/") and "/test_" in path]
    found = {}
    for file in sorted(tests):
        if file == MUTANTS:
            for row in tomllib.loads((root / TABLE).read_text())["mutant"]:
                if not row.get("survives"):
                    names = (
                        row.get("file", ""),
                        "tests/" + row.get("noticed_by", "").split("::")[0],
                    )
                    found[MUTANT.format(row["name"])] = _digest(code, {file, *names}, row)
        elif file.startswith("tests/unit/"):
            found[file] = _digest(code, code)
        else:
            others = code.keys() - {TABLE, *tests} | {file}
            found[file] = _digest(code, _on_ranks(root, file, others) or others)
    return found


def _digest(code: Mapping[str, str], files: Collection[str], *more: object) -> str:
    content = [(path, code[path]) for path in sorted(files) if path in code]
    return hashlib.sha256(repr((content, more)).encode()).hexdigest()[:16]


def _on_ranks(root: Path, file: str, files: Collection[str]) -> set[str]:
    """What a file of tests for tests/dist/worker.py depends on; empty for one that is none, or
    begins processes of its own."""
    if "harness" not in imports(root / file) or "subprocess" in imports(root / file):
        return set()
    besides = {path for path in files if path.startswith(FOUND)}
    return closure(root, [file, *WORKER], files) | besides


def run(root: Path, name: str) -> dict[str, int] | None:
    """The counts of one pytest; None if it came to no end of its own (a signal, Ctrl-C)."""
    log = root / ".cache/test-full" / (name.replace("::test_is_noticed", "") + ".log")
    junit = log.with_suffix(".xml")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", name, f"--junitxml={junit}"]
    with log.open("w") as out:
        environment = {**os.environ, "FIGURES": FIGURES}
        code = subprocess.run(command, cwd=root, stdout=out, stderr=out, env=environment).returncode
    if code in (0, 1):
        return outcome(junit)
    print(f"error: {name}: pytest ended with exit code {code}: see {log}", file=sys.stderr)
    return None


def run_all(root: Path, results: Results, todo: Iterable[str], *, jobs: int, end: float) -> bool:
    """Run them `jobs` at a time until `end`, those that wait beside those that compute; whether
    all passed."""
    todo, is_good = list(todo), True
    waits = deque(name for name in todo if name.startswith(_WAITS))
    computes = deque(name for name in todo if not name.startswith(_WAITS))
    running: dict[Future[dict[str, int] | None], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            while (computes or waits) and len(running) < jobs and time.monotonic() < end:
                is_computing = any(not name.startswith(_WAITS) for name in running.values())
                first, then = (waits, computes) if is_computing else (computes, waits)
                name = (first or then).popleft()
                running[pool.submit(run, root, name)] = name
            if not running:
                return is_good and not computes and not waits
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, counts = running.pop(future), future.result()
                is_good &= counts is not None and not counts["failed"]
                if counts is not None:
                    results.add(name, counts)
                    told = ", ".join(f"{value} {key}" for key, value in counts.items())
                    print(f"{time.strftime('%H:%M')} {name}: {told}", flush=True)


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """0 if every test has passed with this code, in this sitting or an earlier one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="only these files or folders")
    parser.add_argument("--jobs", type=int, default=2, help="pytests at a time (default: 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none after them")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    results = Results(root, digests(root))
    todo = [one for one in results.missing if one.startswith(tuple(options.files) or "")]
    alone = [name for name in todo if name.startswith(_ALONE)]
    beside = [name for name in todo if not name.startswith(_ALONE)]
    passed = run_all(root, results, beside, jobs=options.jobs, end=end)
    passed &= run_all(root, results, alone, jobs=1, end=end)
    for figures in (root / FIGURES).glob("*.json"):
        shutil.move(figures, root / RESULTS / figures.name)
    print(results.summary())
    return 0 if passed and not results.missing else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
