"""Make parquet files for `data.train` and `data.eval` from problem sets that you have downloaded.

    hf download HuggingFaceH4/MATH-500 --repo-type dataset --local-dir downloads/math500
    python tools/prepare_data.py --downloads downloads --out data math500 aime24 dapo-math-17k
    python tools/prepare_data.py mine --file mine.jsonl --columns prompt=task --out data
    python tools/prepare_data.py sums --task chain_sum --size 1000 --out data
    python tools/prepare_data.py legs --task leg_counting --size 1000 --out data \
        --completion sfpo_megatron.demo.legs:worked_solution

Without names: every known set that is there. Each gives OUT/NAME.parquet with the columns `prompt`
and `answer` (and `completion`, worked solutions for `sfpo-megatron sft`); repeated rows are kept
once, questions of a benchmark are taken out of the train sets, and OUT/manifest.json says what was
read, kept and left out, with sha256 of all files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: its own folder is on the path, not the root

from sfpo_megatron import plugins  # noqa: E402
from sfpo_megatron.config.paths import path_from_option  # noqa: E402
from sfpo_megatron.data.prepared import (  # noqa: E402
    NotPrepared,
    Prepared,
    Problem,
    Worked,
    generated,
    once,
    prepare,
    records,
    sha256,
)
from sfpo_megatron.data.taught import COMPLETION  # noqa: E402
from sfpo_megatron.data.values import json_only  # noqa: E402
from tools.prepared_sets import SETS, NoAnswer, ProblemSet, plain  # noqa: E402

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json")
SHOWN = 3


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.task:
        (name,) = args.names or ["task"]
        worked = _worked(args.completion)
        wanted = {
            name: lambda: generated(
                args.task, args.args, size=args.size, seed=args.seed, worked=worked
            )
        }
    elif args.file:
        (name,) = args.names or ["own"]
        own = _own_set(args.columns)
        wanted = {name: lambda: read_set(own, args.file)}
    else:
        wanted = _known(args.names, args.downloads)
    try:
        prepare(wanted, args.out, overwrite=args.overwrite)
    except NotPrepared as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Known sets: {', '.join(SETS)}.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a known set, or a name for yours")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--downloads", type=path_from_option, help="folder with one folder a set")
    source.add_argument("--file", type=path_from_option, nargs="+", help="files of your own")
    source.add_argument("--task", help="a reasoning-gym task, to be generated")
    parser.add_argument("--out", type=path_from_option, required=True, help="folder to write into")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="with --file: prompt=COLUMN answer=COLUMN (default: prompt=prompt answer=answer), "
        "completion=COLUMN (worked solutions)",
    )
    parser.add_argument(
        "--completion",
        metavar="MODULE:FUNCTION",
        help="with --task: makes the column `completion` of an entry, a worked solution",
    )
    parser.add_argument("--size", type=int, help="with --task: number of problems")
    parser.add_argument("--seed", type=int, default=0, help="with --task (default: 0)")
    parser.add_argument(
        "--args", type=_settings, default={}, help="with --task: its settings, as JSON"
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


def _settings(text: str) -> dict[str, Any]:
    """The value of --args."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found no JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"found {text}, expected an object such as '{{\"max_terms\": 2}}'"
        )
    return found


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


def _worked(name: str | None) -> Worked | None:
    """The function that --completion names."""
    if name is None:
        return None
    form = "def completion(entry: Mapping[str, Any]) -> str"
    try:
        worked: Worked = plugins.load(name, key="--completion", form=form)
    except plugins.PluginError as error:
        raise SystemExit(f"error: {error}") from error
    return worked


def _own_set(columns: Sequence[str]) -> ProblemSet:
    named = dict(column.partition("=")[::2] for column in columns)
    if set(named) - {"prompt", "answer", COMPLETION} or not all(named.values()):
        raise SystemExit(
            f"error: --columns: found {' '.join(columns)}, "
            "expected prompt=COLUMN answer=COLUMN completion=COLUMN"
        )
    answer = named.get("answer", "answer")
    return ProblemSet(
        hub="",
        split="",
        is_benchmark=False,
        questions=(named.get("prompt", "prompt"),),
        completion=named.get(COMPLETION, ""),
        answers=((answer, plain), ("reward_model.ground_truth", plain)),
    )


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
                taught = problem_set.taught(row)
            except NoAnswer as error:
                bad[str(error)] += 1
                examples.append(f"{path}:{number}: found {error}")
                continue
            kept, _ = json_only({name: row[name] for name in problem_set.keeps if name in row})
            problems.append(Problem(question, answer, kept | taught))
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
    return once(problems, entry)


if __name__ == "__main__":
    sys.exit(main())
