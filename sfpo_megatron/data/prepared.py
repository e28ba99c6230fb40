"""Problem sets as parquet files: `prompt`, `answer`, what else is kept; and a manifest of them.

tools/prepare_data.py writes through this what has been downloaded, and `sfpo-megatron demo` the
problems that it trains on. Files are written whole or not at all, and only over this module's own.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfpo_megatron.config.source_files import is_blank, lines_in, text_of
from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data import reasoning_gym
from sfpo_megatron.data.arrow import records_of
from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.rows import Row, same_question
from sfpo_megatron.data.taught import COMPLETION
from sfpo_megatron.data.written_json import read_written
from sfpo_megatron.host.replacing import replacing, write_durably

Record = Mapping[str, Any]
MANIFEST = "manifest.json"
Worked = Callable[[Mapping[str, Any]], str]
"""An entry of reasoning-gym -> its worked solution."""


class NotPrepared(ValueError):
    """A file cannot be read, or may not be written: which, what was found, what to do."""


class Problem(NamedTuple):
    """One row of the output."""

    question: str
    answer: str
    kept: dict[str, Any]


class Prepared(NamedTuple):
    """A set as it is written, and what its manifest entry says."""

    problems: list[Problem]
    entry: dict[str, Any]


def prepare(
    wanted: Mapping[str, Callable[[], Prepared]], out: Path, *, overwrite: bool = False
) -> None:
    """Read each set and write OUT/NAME.parquet and the manifest, with a line for each; NotPrepared
    before anything is written. Questions of benchmarks are taken out of the other sets.
    `overwrite`: also files that are not this module's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotPrepared(f"--out {out}: found {error}; name another folder") from error
    manifest = Manifest(out / MANIFEST)
    for name in wanted:
        manifest.check_writable(name, overwrite=overwrite)
    prepared = {name: read() for name, read in wanted.items()}
    held_out = _benchmark_questions(prepared, manifest)
    for name, (problems, entry) in prepared.items():
        if not entry["benchmark"]:
            problems, entry["in_benchmarks"] = _without(problems, held_out)
        if not problems:
            raise NotPrepared(f"{name}: no row is left ({_summary(entry)}); nothing written")
        write(out / f"{name}.parquet", problems)
        manifest.add(name, entry | {"rows": len(problems)})
        print(f"{name}: {len(problems)} rows in {out / name}.parquet ({_summary(entry)})")


def generated(
    task: str,
    args: Mapping[str, Any],
    *,
    size: int,
    seed: int,
    worked: Worked | None = None,
) -> Prepared:
    """`size` problems of a reasoning-gym task, with what its scorer needs. `worked` gives the
    column `completion`, which a warm start imitates."""
    source = DataSource(source="reasoning_gym", task=task, args=dict(args), size=size)
    # Problem i is made from seed + i: seeds that are no hashes would give the same ones, shifted.
    rows = reasoning_gym.rows(source, reasoning_gym.derived_seed("prepared", seed))
    problems = []
    try:
        for row in rows:
            if isinstance(row, Row):
                taught = {COMPLETION: worked(row.metadata["entry"])} if worked else {}
                problems.append(Problem(row.question, row.answer, {**taught, **row.metadata}))
    except DataError as error:
        raise NotPrepared(f"--task {task}: {error}") from error
    entry = {"task": task, "args": dict(args), "seed": seed, "size": size}
    return once(problems, entry | {"benchmark": False, "read": size, "bad": {}})


def once(problems: Iterable[Problem], entry: dict[str, Any]) -> Prepared:
    """Each (question, answer) once, in the order of the files; questions that are there with other
    answers are counted, and kept."""
    kept: dict[tuple[str, str], Problem] = {}
    num = 0
    for problem in problems:
        num += 1
        kept.setdefault((same_question(problem.question), problem.answer), problem)
    questions = Counter(question for question, _ in kept)
    entry["repeated"] = num - len(kept)
    entry["questions_with_several_answers"] = sum(n > 1 for n in questions.values())
    return Prepared(list(kept.values()), entry)


def _benchmark_questions(prepared: dict[str, Prepared], manifest: Manifest) -> set[str]:
    """Questions of the benchmarks that are prepared now, or lie in the folder already."""
    found = {
        same_question(problem.question)
        for problems, entry in prepared.values()
        if entry["benchmark"]
        for problem in problems
    }
    for path in manifest.benchmarks():
        found |= {same_question(str(row["prompt"])) for row in records(path)}
    return found


def _without(problems: list[Problem], held_out: set[str]) -> tuple[list[Problem], int]:
    kept = [p for p in problems if same_question(p.question) not in held_out]
    return kept, len(problems) - len(kept)


def _summary(entry: dict[str, Any]) -> str:
    parts = [f"{entry['read']} read", f"{entry['repeated']} repeated"]
    if entry.get("in_benchmarks"):
        parts.append(f"{entry['in_benchmarks']} are questions of a benchmark")
    if several := entry["questions_with_several_answers"]:
        parts.append(f"{several} questions have several answers")
    parts += [f"{number} left out: {what}" for what, number in entry["bad"].items()]
    return ", ".join(parts)


def records(path: Path) -> Iterator[Record]:
    """The rows of a parquet, jsonl (also .gz) or JSON file (a list, or {"data": [...]})."""
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
            for record in records_of(batches):
                if isinstance(record, ValueError):
                    raise record
                yield record
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            with path.open("rb") as file:
                for line in lines_in(file):
                    if not is_blank(line):
                        yield _mapping(read_written(text_of(line)))
        else:
            value = read_written(text_of(path.read_bytes()))
            rows = value.get("data") if isinstance(value, dict) else value
            yield from map(_mapping, rows if isinstance(rows, list) else [rows])
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:  # Arrow's too
        raise NotPrepared(f"{path}: found {error}; is it downloaded whole?") from error


def _mapping(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where a row with columns should be")
    return value


def write(path: Path, problems: Sequence[Problem]) -> None:
    """The problems as parquet, whole or not at all; NotPrepared for a column of several types."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for problem in problems for name in problem.kept))
    table = {
        "prompt": [problem.question for problem in problems],
        "answer": [problem.answer for problem in problems],
        **{name: [_text(problem.kept.get(name)) for problem in problems] for name in names},
    }
    try:
        columns = pyarrow.table(table)
    except pyarrow.ArrowException as error:
        raise NotPrepared(
            f"{path}: found a column of several types ({error}), expected one; correct the rows"
        ) from error
    with replacing(path) as aside:
        pyarrow.parquet.write_table(columns, aside)


def _text(value: Any) -> Any:
    """A further column's value as parquet can hold it beside others': nested ones as JSON."""
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value


class Manifest:
    """OUT/manifest.json: what this tool wrote there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.entries = json.loads(path.read_text(encoding="utf-8"))["sets"]
            except (ValueError, KeyError, TypeError) as error:
                raise NotPrepared(
                    f"{path}: found no manifest of this tool ({error}); choose another --out"
                ) from error

    def check_writable(self, name: str, *, overwrite: bool) -> None:
        """NotPrepared if NAME.parquet is there and not as this tool left it."""
        path = self._path.with_name(f"{name}.parquet")
        known = self.entries.get(name, {}).get("sha256")
        if path.exists() and not overwrite and sha256(path) != known:
            raise NotPrepared(
                f"{path}: found a file that this tool did not write, or that was changed "
                "since; move it away, choose another --out, or give --overwrite"
            )

    def benchmarks(self) -> list[Path]:
        """The files of benchmarks that are there."""
        paths = [
            self._path.with_name(f"{name}.parquet")
            for name, entry in self.entries.items()
            if entry["benchmark"]
        ]
        return [path for path in paths if path.exists()]

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Put a set's entry into the file."""
        path = self._path.with_name(f"{name}.parquet")
        self.entries[name] = entry | {"sha256": sha256(path)}
        write_durably(self._path, json.dumps({"sets": self.entries}, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
