"""SFPO against tuned GRPO: runs the next missing cells of study.toml, over many sittings.

    python examples/sfpo_vs_grpo/study.py [--task aiw] [--minutes 60] [--jobs 2]    (make study)
    python examples/sfpo_vs_grpo/study.py --list          what is still to be run
    python examples/sfpo_vs_grpo/study.py --timing        what a rollout costs in each arm
    python examples/sfpo_vs_grpo/study.py --results       docs/results.md from what is committed

A cell is `sfpo-megatron train` on a task's config with the settings of an arm, from the warm start
of its seed. First the tuning seeds, lr by lr; then `frozen.json` is written and has to be
committed; then the confirming seeds; then the ablations. An interrupted cell begins again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]  # run as a file, from anywhere

import costs  # noqa: E402
import saved  # noqa: E402
import sums  # noqa: E402
import timing  # noqa: E402
from cells import Cell, Study, frozen_file, timing_file  # noqa: E402

from sfpo_megatron.config.load import load_config  # noqa: E402
from sfpo_megatron.data.prepared import generated, prepare  # noqa: E402
from sfpo_megatron.demo.legs import write_data as write_legs  # noqa: E402
from sfpo_megatron.demo.tiny_model import DEMO, make_tiny_model  # noqa: E402
from sfpo_megatron.outputs.starts import commit, machine  # noqa: E402

RUNS = ROOT / "runs/study"
_MAKING = threading.Lock()
"""transformers fetches its names when they are first asked for, and cannot do so twice at once."""
_LOCKS: dict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)


_BUSY = 0.5
"""Load of the machine from which on seconds would be those of other processes too."""


class Unfinished(Exception):
    """A command ended otherwise than by itself: the cell has no result, and is run again."""


def command(name: str, config: Path, overrides: list[str], log: Path) -> int:
    """Run a command of ours with its output in a file; its exit code, 0 or 1."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "sfpo_megatron", name, str(config), "--fresh", *overrides]
    with log.open("a") as out:
        code = subprocess.run(words, cwd=ROOT, stdout=out, stderr=out).returncode
    if code not in (0, 1):  # a signal, lost engines, a wrong config
        raise Unfinished(f"{name} ended with exit code {code}: see {log}")
    return code


def write_data() -> None:
    """The problems of the tasks that come from files."""
    write_legs(RUNS / "data")
    problems = {
        name: partial(generated, sums.TASK, sums.ARGS, size=size, seed=seed,
                      worked=sums.slipping_solution)
        for name, size, seed in (("sums-train", 10_000, 0), ("sums-eval", 600, 1))
    }  # fmt: skip
    prepare(problems, RUNS / "data")


def warm_start(study: Study, task: str, seed: int) -> Path:
    """The policy that all arms of a seed start from, made if it is not there."""
    folder = RUNS / task / f"warm-{seed}"
    with _LOCKS[task, seed]:
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            config = HERE / study.tasks[task]["config"]
            with _MAKING:
                make_tiny_model(load_config(str(config)), folder / "model", DEMO, seed=seed)
            overrides = [
                f"model.path={folder / 'model'}", f"output_dir={folder / 'sft'}", f"seed={seed}"
            ]  # fmt: skip
            log = folder / "sft.log"
            if code := command("sft", config, overrides, log):
                raise Unfinished(f"the warm start ended with exit code {code}: see {log}")
            (folder / "done").touch()
    return folder / "sft/hf"


def run_cell(study: Study, cell: Cell) -> None:
    """Train, and leave the result."""
    config = HERE / study.tasks[cell.task]["config"]
    model = warm_start(study, cell.task, cell.seed)
    folder = RUNS / cell.task / f"{cell.arm}-{cell.lr:g}-{cell.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    changed = overrides_of(study, cell)
    words = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    begun = time.monotonic()
    code = command(
        "train", config, [*words, f"model.path={model}", f"output_dir={folder}"], folder / "log"
    )
    if code and not ended_itself(folder):
        raise Unfinished(f"{cell} failed: see {folder / 'log'}")
    about = {
        "settings": changed,
        "ended": "finished" if code == 0 else (folder / "log").read_text().splitlines()[-1][:300],
        "seconds": round(time.monotonic() - begun, 1),
        "commit": commit(),
        "hardware": machine(),
    }
    saved.write(cell.file, about, list(saved.trimmed(folder / "metrics.jsonl")))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def time_arms(study: Study, task: str, rounds: int) -> None:
    """Short runs of all arms in turns, from one warm start; leave what a rollout cost in each."""
    lrs, seed = study.frozen(task)["lrs"], study.settings["tuning_seeds"][0]
    model = warm_start(study, task, seed)
    found: dict[str, list[float]] = {arm: [] for arm in lrs}
    for number, arm in timing.turns(list(lrs), rounds):
        folder = RUNS / task / f"timing/{number}-{arm}"
        shutil.rmtree(folder, ignore_errors=True)
        changed = overrides_of(study, Cell(task=task, arm=arm, lr=lrs[arm], seed=seed))
        changed |= {"train.num_steps": timing.NUM_STEPS, "eval.every": 0}
        words = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
        words += [f"model.path={model}", f"output_dir={folder}"]
        if command("train", HERE / study.tasks[task]["config"], words, folder / "log"):
            raise Unfinished(f"{arm} failed: see {folder / 'log'}")
        run = saved.outcome({}, list(saved.trimmed(folder / "metrics.jsonl")))
        found[arm].append(costs.a_rollout(run))
        print(f"round {number + 1}: {arm} {1000 * found[arm][-1]:.2f} ms a rollout", flush=True)
    about = {"num_steps": timing.NUM_STEPS, "commit": commit(), "hardware": machine()}
    text = json.dumps({**about, "seconds_a_rollout": found}, indent=1)
    timing_file(task).write_text(text + "\n", encoding="utf-8")


def is_alone() -> bool:
    """Whether nothing else has kept the machine busy in the last minute."""
    return os.getloadavg()[0] < _BUSY


def ended_itself(run: Path) -> bool:
    """Whether a run that failed has collapsed, which is a result; what a machine does is none."""
    file = run / "logs/rank_0.exit"
    return file.exists() and file.read_text().split()[1:] == ["final"]


def overrides_of(study: Study, cell: Cell) -> dict[str, Any]:
    """What a cell changes in its task's config."""
    changed = dict(study.settings_of(cell.arm))
    batch = changed.pop("batch", 1)
    config = load_config(str(HERE / study.tasks[cell.task]["config"]))
    if batch != 1:
        changed |= {
            "train.prompts_per_step": round(config.train.prompts_per_step * batch),
            "train.num_steps": round((config.train.num_steps or 0) / batch),
            "eval.every": round((config.eval.every or 0) / batch),
        }
    return {**changed, "train.optimizer.lr": cell.lr, "seed": cell.seed}


def missing(study: Study, tasks: list[str]) -> Iterator[Cell]:
    """The cells that can be run now, in order."""
    for task in tasks:
        if cells := study.tuning(task):
            yield from cells
            continue
        if not study.frozen(task):
            file = frozen_file(task)
            file.write_text(json.dumps(study.freeze(task), indent=1) + "\n")
            print(f"{task}: tuned; its confirming seeds wait for {file} to be committed")
        plan = (frozen_file(task), HERE / "study.toml", HERE / study.tasks[task]["config"])
        if not all(map(is_committed, plan)):
            continue
        yield from study.confirming(task)
        if task == study.settings["gates"]["task"]:
            yield from study.forking()
        if task == study.settings["ablations"]["task"]:
            yield from study.ablating()


def is_committed(file: Path) -> bool:
    """Whether the file is in the last commit as it is."""
    known = subprocess.run(["git", "ls-files", "--error-unmatch", str(file)], cwd=ROOT,
                           capture_output=True)  # fmt: skip
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(file)], cwd=ROOT)
    return known.returncode == changed.returncode == 0


def main() -> int:
    """Run cells until none is missing, or the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", action="append", help="only this one; may be given again")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin none after these"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the missing cells")
    parser.add_argument(
        "--timing", action="store_true", help="time the arms of a tuned task in turns, alone"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of --timing (default: 5)")
    parser.add_argument("--results", action="store_true", help="write docs/results.md")
    options = parser.parse_args()
    if options.results:
        from results import write_page

        write_page(Study())
        return 0
    tasks = options.task or list(Study().tasks)
    if options.list:
        for cell in missing(Study(), tasks):
            print(f"{cell.task:6} {cell.arm:14} lr {cell.lr:g} seed {cell.seed}")
        return 0
    try:
        if options.timing:
            return time_all(tasks, options.rounds)
        write_data()
        return run_cells(tasks, options.minutes, options.jobs)
    except Unfinished as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


def time_all(tasks: list[str], rounds: int) -> int:
    """Time the arms of the tasks whose learning rates are chosen."""
    if not is_alone():
        print(
            f"error: found a load of {os.getloadavg()[0]:.1f}, expected less than {_BUSY}: "
            "--timing measures alone; stop what else runs, and wait a minute", file=sys.stderr,
        )  # fmt: skip
        return 2
    write_data()
    study = Study()
    for task in tasks:
        if study.frozen(task):
            time_arms(study, task, rounds)
        else:
            print(f"{task}: its learning rates are not chosen yet")
    return 0


def run_cells(tasks: list[str], minutes: float, jobs: int) -> int:
    """Run missing cells, `jobs` at a time, and begin none after `minutes`."""
    deadline = time.monotonic() + 60 * minutes
    running: dict[Future[None], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            study = Study()  # what comes next depends on what has ended
            waiting = [cell for cell in missing(study, tasks) if cell not in running.values()]
            for cell in waiting[: jobs - len(running)]:
                if time.monotonic() < deadline:
                    running[pool.submit(run_cell, study, cell)] = cell
            if not running:
                return 0
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                future.result()
                print(f"{time.strftime('%H:%M')} {cell}; {len(waiting)} others known", flush=True)


if __name__ == "__main__":
    sys.exit(main())
