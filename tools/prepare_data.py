"""Make parquet files for `data.train` and `data.eval` from problem sets that you have downloaded.

    hf download HuggingFaceH4/MATH-500 --repo-type dataset --local-dir downloads/math500
    python tools/prepare_data.py --downloads downloads --out data math500 aime24 dapo-math-17k
    python tools/prepare_data.py mine --file mine.jsonl --columns prompt=task --out data
    python tools/prepare_data.py sums --task chain_sum --size 1000 --out data

Without names: every known set that is there. Each gives OUT/NAME.parquet with the columns `prompt`
and `answer`; rows that repeat are kept once, questions of a benchmark are taken out of the train
sets, and OUT/manifest.json says what was read, kept and left out, with sha256 of all files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: its own folder is on the path, not the root

from sfpo_megatron.config.source_files import text_of  # noqa: E402
from sfpo_megatron.data.arrow import records_of  # noqa: E402
from sfpo_megatron.data.rows import same_question  # noqa: E402
from sfpo_megatron.data.values import json_only, written_float  # noqa: E402
from tools.prepared_sets import SETS, NoAnswer, ProblemSet, Record, plain  # noqa: E402

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json")
MANIFEST = "manifest.json"
SHOWN = 3


class Problem(NamedTuple):
    """One row of the output."""

    question: str
    answer: str
    kept: dict[str, Any]


class Prepared(NamedTuple):
    """A set as it is written, and what its manifest entry says."""

    problems: list[Problem]
    entry: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out {args.out}: found {error}; name another folder") from error
    manifest = Manifest(args.out / MANIFEST)
    if args.task:
        (name,) = args.names or ["task"]
        wanted = {name: lambda: generated(args.task, args.args, args.size, args.seed)}
    elif args.file:
        (name,) = args.names or ["own"]
        own = _own_set(args.columns)
        wanted = {name: lambda: read_set(own, args.file)}
    else:
        wanted = _known(args.names, args.downloads)
    for name in wanted:
        manifest.check_writable(name, overwrite=args.overwrite)
    prepared = {name: read() for name, read in wanted.items()}
    held_out = _benchmark_questions(prepared, manifest)
    for name, (problems, entry) in prepared.items():
        if not entry["benchmark"]:
            problems, entry["in_benchmarks"] = _without(problems, held_out)
        if not problems:
            raise SystemExit(f"error: {name}: no row is left ({_summary(entry)}); nothing written")
        write(args.out / f"{name}.parquet", problems)
        manifest.add(name, entry | {"rows": len(problems)})
        print(f"{name}: {len(problems)} rows in {args.out / name}.parquet ({_summary(entry)})")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Known sets: {', '.join(SETS)}.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a known set, or a name for yours")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--downloads", type=Path, help="folder with one folder a set")
    source.add_argument("--file", type=Path, nargs="+", help="files of your own")
    source.add_argument("--task", help="a reasoning-gym task, to be generated")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="with --file: prompt=COLUMN answer=COLUMN (default: prompt=prompt answer=answer)",
    )
    parser.add_argument("--size", type=int, help="with --task: number of problems")
    parser.add_argument("--seed", type=int, default=0, help="with --task (default: 0)")
    parser.add_argument(
        "--args", type=json.loads, default={}, help="with --task: its settings, as JSON"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that this tool did not write"
    )
    args = parser.parse_intermixed_args(argv)
    if (args.task or args.file) and len(args.names) > 1:
        parser.error(f"found the names {' '.join(args.names)}, expected one with --file or --task")
    for name in args.names:
        if Path(name).name != name or name.startswith("."):
            parser.error(f"found the name {name!r}, expected one of a file, without folders")
    if args.task and (args.size is None or args.size < 1):
        parser.error(f"found --size {args.size}, expected 1 or more with --task")
    return args


# ---- what to read ------------------------------------------------------------------------------


def _known(names: Sequence[str], downloads: Path) -> dict[str, Any]:
    """Name -> how to read it, of the known sets that are asked for; SystemExit if one is missing,
    naming all that are and where to get them."""
    if unknown := [name for name in names if name not in SETS]:
        raise SystemExit(
            f"error: found {', '.join(unknown)}, expected known sets ({', '.join(SETS)}); "
            "give --file for files of your own"
        )
    found = {name: _files(downloads / name, SETS[name]) for name in names or SETS}
    missing = [name for name, files in found.items() if not files]
    if (names and missing) or len(missing) == len(found):
        commands = "".join(
            f"\n  hf download {SETS[name].hub} --repo-type dataset --local-dir {downloads / name}"
            for name in missing
        )
        raise SystemExit(
            f"error: no {' or '.join(SUFFIXES)} file of {', '.join(missing)}; "
            f"download them first:{commands}"
        )

    def reader(name: str, files: list[Path]) -> Any:
        return lambda: read_set(SETS[name], files)

    return {name: reader(name, files) for name, files in found.items() if files}


def _files(folder: Path, problem_set: ProblemSet) -> list[Path]:
    """The data files of a downloaded set: those of its split, where names tell splits apart."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name.endswith(SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name != "dataset_info.json"
    )
    of_config = [path for path in found if problem_set.config in path.parts] or found
    return [path for path in of_config if path.name.startswith(problem_set.split)] or of_config


def _own_set(columns: Sequence[str]) -> ProblemSet:
    named = dict(column.partition("=")[::2] for column in columns)
    if set(named) - {"prompt", "answer"} or not all(named.values()):
        raise SystemExit(
            f"error: --columns: found {' '.join(columns)}, expected prompt=COLUMN answer=COLUMN"
        )
    answer = named.get("answer", "answer")
    return ProblemSet(
        hub="",
        split="",
        is_benchmark=False,
        questions=(named.get("prompt", "prompt"),),
        answers=((answer, plain), ("reward_model.ground_truth", plain)),
    )


def generated(task: str, args: dict[str, Any], size: int, seed: int) -> Prepared:
    """`size` problems of a reasoning-gym task, with what its scorer needs."""
    from sfpo_megatron.config.tree import DataSource
    from sfpo_megatron.data import DataError, reasoning_gym
    from sfpo_megatron.data.rows import Row

    source = DataSource(source="reasoning_gym", task=task, args=args, size=size)
    try:
        rows = [row for row in reasoning_gym.rows(source, seed) if isinstance(row, Row)]
    except DataError as error:
        raise SystemExit(f"error: --task {task}: {error}") from error
    problems = [Problem(row.question, row.answer, dict(row.metadata)) for row in rows]
    entry = {
        "task": task, "args": args, "seed": seed, "benchmark": False, "read": size, "bad": {}
    }  # fmt: skip
    return _once(problems, entry)


# ---- rows --------------------------------------------------------------------------------------


def read_set(problem_set: ProblemSet, files: Sequence[Path]) -> Prepared:
    """All problems of the files, each once."""
    problems: list[Problem] = []
    bad: Counter[str] = Counter()
    examples: list[str] = []
    num_read = 0
    for path in files:
        for number, row in enumerate(records(path), start=1):
            num_read += 1
            try:
                question, answer = problem_set.question(row), problem_set.answer(row)
            except NoAnswer as error:
                bad[str(error)] += 1
                examples.append(f"{path}:{number}: found {error}")
                continue
            kept, _ = json_only({name: row[name] for name in problem_set.keeps if name in row})
            problems.append(Problem(question, answer, kept))
    entry: dict[str, Any] = {
        "hub": problem_set.hub or None,
        "benchmark": problem_set.is_benchmark,
        "files": {str(path): sha256(path) for path in files},
        "read": num_read,
        "bad": dict(bad),
    }
    for line in examples[:SHOWN]:
        print(f"left out: {line}", file=sys.stderr)
    if problem_set.num_rows not in (None, num_read):
        print(
            f"warning: found {num_read} rows, {problem_set.hub} was published with "
            f"{problem_set.num_rows}; is a file missing, or one too many there? "
            + ", ".join(map(str, files)),
            file=sys.stderr,
        )
    return _once(problems, entry)


def _once(problems: Iterable[Problem], entry: dict[str, Any]) -> Prepared:
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


# ---- files -------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[Record]:
    """The rows of a parquet, jsonl (also .gz) or JSON file (a list, or {"data": [...]})."""
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
            yield from records_of(batches)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as lines:
                yield from (_mapping(_json(text_of(line))) for line in lines if line.strip())
        else:
            value = _json(text_of(path.read_bytes()))
            rows = value.get("data") if isinstance(value, dict) else value
            yield from map(_mapping, rows if isinstance(rows, list) else [rows])
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise SystemExit(f"error: {path}: found {error}; is it downloaded whole?") from error


def _json(text: str) -> Any:
    return json.loads(text, parse_float=written_float)


def _mapping(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where a row with columns should be")
    return value


def write(path: Path, problems: Sequence[Problem]) -> None:
    """The problems as parquet, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for problem in problems for name in problem.kept))
    table = {
        "prompt": [problem.question for problem in problems],
        "answer": [problem.answer for problem in problems],
        **{name: [_text(problem.kept.get(name)) for problem in problems] for name in names},
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pyarrow.parquet.write_table(pyarrow.table(table), aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


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
                raise SystemExit(
                    f"error: {path}: found no manifest of this tool ({error}); choose another --out"
                ) from error

    def check_writable(self, name: str, *, overwrite: bool) -> None:
        """SystemExit if NAME.parquet is there and not as this tool left it."""
        path = self._path.with_name(f"{name}.parquet")
        known = self.entries.get(name, {}).get("sha256")
        if path.exists() and not overwrite and sha256(path) != known:
            raise SystemExit(
                f"error: {path}: found a file that this tool did not write, or that was changed "
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
        aside = self._path.with_name(f".{MANIFEST}.{os.getpid()}")
        aside.write_text(json.dumps({"sets": self.entries}, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self._path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
