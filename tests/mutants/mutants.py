"""One-line faults (table.toml), each made in a copy of the tree, and the test that notices it.

    python tests/mutants/mutants.py [NAME...] [--first] [--record]     these rows, else all

The tests that a row names run first, the whole default run only where they pass. `--first` leaves
that out; `--record` writes what was found into the table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("table.toml")
EVERYTHING = ("unit", "dist", "slurm", "e2e")
"""The default run, cheapest first: one pytest each, as some files have the same name in two."""
_LIMIT_S = 1800.0


@dataclass(kw_only=True, frozen=True, slots=True)
class Mutant:
    """A row of the table, whose head says what the fields are."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    noticed_by: str = ""
    survives: str = ""

    def apply(self, tree: Path) -> None:
        """Make the fault in `tree`; ValueError unless its line is there exactly once."""
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(
                f"{TABLE.name}, {self.name}: found {self.before!r} {text.count(self.before)} times "
                f"in {self.file}, expected once; rewrite the row for the line as it is now"
            )
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


def read_table() -> dict[str, Mutant]:
    """The rows by name."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]
    return {row["name"]: Mutant(**row | {"tests": tuple(row["tests"])}) for row in rows}


@contextmanager
def faulty_tree(mutant: Mutant) -> Iterator[Path]:
    """A copy of the files that git would commit, with the fault in it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in filter(None, listed.split("\0")):
            if os.path.lexists(ROOT / name):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        if (ROOT / ".venv").exists():
            (tree / ".venv").symlink_to(ROOT / ".venv")
        mutant.apply(tree)
        yield tree


def noticed_by(mutant: Mutant, kinds: Sequence[str] = (), *, first_only: bool = False) -> str:
    """The first test that fails, within tests/, and passes once the fault is taken back; empty if
    none does. `kinds`: folders of tests/ to stay in, by default all."""
    known = (mutant.noticed_by,) if mutant.noticed_by else ()
    everything = () if first_only else EVERYTHING
    with faulty_tree(mutant) as tree:
        for tests in (*known, *mutant.tests, *everything):
            if kinds and tests.partition("/")[0] not in kinds:
                continue
            if found := _failure(tree, tests):
                shutil.copy2(ROOT / mutant.file, tree / mutant.file)
                if _failure(tree, found):
                    raise RuntimeError(f"{mutant.name}: tests/{found} fails without the fault too")
                return found
    return ""


def _failure(tree: Path, tests: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not full", f"tests/{tests}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if result.returncode == 0:
        return ""
    # Not by an error of the collection (2 to 5): then no test has looked at the fault.
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", result.stdout, flags=re.MULTILINE)
    if result.returncode != 1 or failed is None:
        raise RuntimeError(
            f"pytest {tests} ended with {result.returncode}: {result.stdout[-2000:]}"
        )
    return failed[1]


def record(name: str, found: str) -> None:
    """Write `noticed_by` into the row."""
    head, _, rest = TABLE.read_text(encoding="utf-8").partition(f'\nname = "{name}"\n')
    row, end, after = rest.partition("\n[[mutant]]")
    lines = [line for line in row.splitlines() if not line.startswith("noticed_by = ")]
    last = next(n for n, line in enumerate(lines) if line.startswith("tests = "))
    lines.insert(last + 1, f'noticed_by = "{found}"')
    row = "\n".join(lines) + ("\n" if row.endswith("\n") else "")
    TABLE.write_text(f'{head}\nname = "{name}"\n{row}{end}{after}', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a mutant that should be noticed survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--first", action="store_true", help="only the tests that the rows name")
    parser.add_argument("--record", action="store_true", help="write noticed_by into the table")
    parser.add_argument(
        "--in", nargs="+", dest="kinds", default=(), metavar="FOLDER", help="of tests"
    )
    given = parser.parse_args(arguments)
    table, survivors = read_table(), 0
    for name in given.names or table:
        begun = time.monotonic()
        found = noticed_by(table[name], given.kinds, first_only=given.first)
        if found and given.record:
            record(name, found)
        survivors += not found and not table[name].survives
        seconds = time.monotonic() - begun
        print(f"{name}: {found or 'SURVIVES'} ({seconds:.0f} s)", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
