"""Every test with its long matrices, in as many sittings and on as many machines as it takes.

    python tests/full.py [--minutes 60] [--jobs 2] [FILE ...]    (make test-full)

What passed is noted in benchmarks/results/test_full.json and not run again while the code is the
same: commit that file to go on elsewhere. A file of tests runs in a pytest of its own, a mutant
too; those of Slurm, whose own limits know no neighbours, alone and last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file

import torch  # noqa: E402

from benchmarks.common.provenance import write  # noqa: E402
from benchmarks.common.suites import outcome  # noqa: E402

CODE = (
    *("sfpo_megatron", "tests", "examples", "launch", "tools", "requirements"),
    *("Makefile", "pyproject.toml", "setup.py"),
    ":(exclude)examples/sfpo_vs_grpo/results",
)
"""What a test may depend on, as git takes it."""
MUTANTS = "tests/mutants/test_mutants.py"
RESULTS = "benchmarks/results"
FIGURES = ".cache/test-full/figures"
"""Folder for what tests measure: in RESULTS it would make pages of docs/ stale meanwhile."""
_ALONE = "tests/slurm/"
_LAST = "tests/e2e/"
"""Begun from the other end: they wait where the rest computes."""


class Results:
    """What has run with this code: `benchmarks/results/test_full.json`."""

    def __init__(self, root: Path, code: str, wanted: Sequence[str]) -> None:
        self._file = root / RESULTS / "test_full.json"
        self._code = code
        self._wanted = wanted
        found = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._ran: dict[str, Any] = found["ran"] if found.get("code") == code else {}

    @property
    def missing(self) -> list[str]:
        """What has not passed, in order."""
        return [one for one in self._wanted if self._ran.get(one, {"failed": 1})["failed"]]

    def add(self, name: str, counts: dict[str, int]) -> None:
        """Note it at once: the sitting may end at any moment."""
        self._ran[name] = counts
        content = {"code": self._code, "missing": len(self.missing), "ran": self._ran}
        features = [] if self.missing else ["test-full"]
        write(self._file, content, device=torch.device("cpu"), features=features)


def git(root: Path, *words: str, stdin: str | None = None) -> str:
    """What a git command says."""
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def code_of(root: Path) -> str:
    """A digest of the code as it is committed. SystemExit if the tree differs from it."""
    paths = [path for path in CODE if path.startswith(":") or (root / path).exists()]
    if changed := git(root, "status", "--porcelain", "--", *paths):
        raise SystemExit(f"error: found changes, expected what is committed:\n{changed.rstrip()}")
    return git(root, "hash-object", "--stdin", stdin=git(root, "ls-files", "-s", *paths)).strip()


def names(root: Path) -> Iterator[str]:
    """What pytest is called with: files, and mutants one by one; Slurm's last."""
    files = git(root, "ls-files", "tests/*/test_*.py").split()
    for file in sorted(files, key=lambda file: (file.startswith(_ALONE), file.startswith(_LAST))):
        if file != MUTANTS:
            yield file
            continue
        rows = tomllib.loads((root / "tests/mutants/table.toml").read_text())["mutant"]
        for row in rows:
            if not row.get("survives"):
                yield f"{file}::test_is_noticed[{row['name']}]"


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
    """Run them `jobs` at a time, from both ends of the list, until `end`; whether all passed."""
    waiting, is_good = deque(todo), True
    running: dict[Future[dict[str, int] | None], tuple[str, bool]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            while waiting and len(running) < jobs and time.monotonic() < end:
                is_first = all(not first for _, first in running.values())
                name = waiting.popleft() if is_first else waiting.pop()
                running[pool.submit(run, root, name)] = name, is_first
            if not running:
                return is_good and not waiting
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, _ = running.pop(future)
                counts = future.result()
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
    results = Results(root, code_of(root), list(names(root)))
    todo = [one for one in results.missing if one.startswith(tuple(options.files) or "")]
    alone = [name for name in todo if name.startswith(_ALONE)]
    beside = [name for name in todo if not name.startswith(_ALONE)]
    passed = run_all(root, results, beside, jobs=options.jobs, end=end)
    passed &= run_all(root, results, alone, jobs=1, end=end)
    for figures in (root / FIGURES).glob("*.json"):
        shutil.move(figures, root / RESULTS / figures.name)
    left = results.missing
    print(f"{len(left)} left" if left else "all have passed with this code")
    return 0 if passed and not left else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
