"""docs/results.md and its pictures, from the committed results (`study.py --results`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import budget
import costs
import gates
import pictures
import timing
from cells import HERE, Study, point_name
from pairs import PairedRatio, paired_difference, paired_ratio, quotient
from saved import Outcome
from tables import hardware, interval, made_with, table

ROOT = HERE.parents[1]
PAGE, IMAGES = ROOT / "docs/results.md", ROOT / "docs/images"
MARK = "<!-- written by `python examples/sfpo_vs_grpo/study.py --results` from here on -->\n"
BASE, OURS = "grpo", "sfpo"
_HEAD = (
    *("arm", "lr", "rollouts to threshold", "GRPO / arm", "t interval", "bootstrap"),
    *("arm / SFPO", "final accuracy", "SFPO's less the arm's", "broke", "made with"),
)
_COST_HEAD = (
    *("arm", "seconds", "cost of a rollout", "speed-up"),
    *("rollouts in backward passes", "tokens generated", "made with"),
)
_BOUNDS = (
    "A run that never gets there counts with its whole budget. Then it says in how many pairs the "
    "ratio is a lower bound, an upper one, or open, which counts as 1: neither of both got there."
)


def write_page(study: Study) -> None:
    """Write the tables of each task below the reading, which is written by hand and stays."""
    reading = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    parts = [
        reading + MARK + "\n",
        *(part for task in study.tasks for part in task_part(study, task)),
        *budget.told(study),
    ]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def task_part(study: Study, task: str) -> Iterator[str]:
    """What is known of a task so far."""
    yield f"## {task}\n"
    seeds = study.settings["tuning_seeds"]
    if not any(study.outcomes(task, a, lr, seeds) for a in study.arms for lr in study.lrs(task, a)):
        yield "No run yet.\n"
        return
    yield from sweep(study, task)
    if not study.frozen(task):
        yield "The tuning seeds have not all run: nothing is chosen yet.\n"
        return
    yield from confirmed(study, task)
    if task == study.settings["gates"]["task"]:
        yield from gates.told(study, task)
    if task == study.settings["ablations"]["task"]:
        yield from ablations(study, task)


def sweep(study: Study, task: str) -> Iterator[str]:
    """Mean accuracy over evaluations, and the final one, by arm and lr, over the tuning seeds."""
    seeds = study.settings["tuning_seeds"]
    lrs = sorted({lr for arm in study.arms for lr in study.lrs(task, arm)})
    machines = hardware(study.everything(task))
    yield f"Tuning, {len(seeds)} seeds: accuracy averaged over the evaluations / final.\n"
    rows = []
    for arm in study.arms:
        cells, runs = [], []
        for lr in lrs:
            found = study.outcomes(task, arm, lr, seeds)
            runs += found
            told = (
                f"{mean(o.score for o in found):.3f} / {mean(o.final for o in found):.3f}"
                if found
                else ""
            )
            is_best = study.frozen(task).get("lrs", {}).get(arm) == lr
            cells.append(f"**{told}**" if is_best else told)
        rows.append([arm, *cells, made_with(runs, machines)])
    yield from table(["arm", *(f"lr {lr:g}" for lr in lrs), "made with"], rows)
    yield ""


def confirmed(study: Study, task: str) -> Iterator[str]:
    """The confirming seeds: costs and their ratios to tuned GRPO."""
    frozen, seeds = study.frozen(task), study.confirming_seeds(task)
    threshold, lrs = frozen["threshold"], frozen["lrs"]
    found = {arm: study.outcomes(task, arm, lr, seeds) for arm, lr in lrs.items()}
    done = [
        seed for seed in seeds if all(study.outcomes(task, a, lr, [seed]) for a, lr in lrs.items())
    ]
    if not done:
        yield "No confirming seed has run in all arms yet.\n"
        return
    yield (
        f"Confirming, {len(done)} of {len(seeds)} fresh seeds, paired. Threshold: {threshold:.3f}, "
        f"{study.settings['threshold']:.0%} of tuned GRPO's final {frozen['grpo_final']:.3f}.\n"
    )
    paired = {arm: [study.outcomes(task, arm, lrs[arm], [seed])[0] for seed in done] for arm in lrs}
    machines = hardware(study.everything(task))
    yield from table(
        _HEAD,
        (
            [arm, f"{lrs[arm]:g}", *figures(arm, paired, threshold), made_with(runs, machines)]
            for arm, runs in paired.items()
        ),
    )
    yield (
        "\nGRPO / arm: how many times as many rollouts GRPO needs, the geometric mean over pairs. "
        "arm / SFPO: the arm, as SFPO. SFPO's less the arm's: final accuracy, the mean over pairs. "
        "Both with t intervals. " + _BOUNDS + "\n"
    )
    yield from costs_told(study, task, paired, threshold)
    picture = IMAGES / f"study-{task}.png"
    pictures.curves(found, threshold, picture, title=task)
    yield f"![Held-out accuracy of the arms against rollouts, {task}](images/{picture.name})\n"


def figures(arm: str, paired: Mapping[str, Sequence[Outcome]], threshold: float) -> Iterator[str]:
    """Cells of one arm's row, from its rollouts on; the runs of all arms are of the same seeds."""
    runs = paired[arm]
    mine, of_base, of_ours = (
        [run.reached(threshold) for run in paired[one]] for one in (arm, BASE, OURS)
    )
    reached = [cost for cost in mine if cost is not None]
    missed = len(mine) - len(reached)
    yield (f"{mean(reached):,.0f}" if reached else "-") + (f", never in {missed}" if missed else "")
    most = _budget(paired)
    ratio = paired_ratio(of_base, mine, budget=most)
    yield f"{ratio.value:.2f}" + (f" ({ratio.bounds})" if ratio.bounds else "")
    yield interval(ratio.t_interval)
    yield interval(ratio.bootstrap)
    to_ours = paired_ratio(mine, of_ours, budget=most)
    bounds = f"; {to_ours.bounds}" if to_ours.bounds else ""
    yield f"{to_ours.value:.2f} ({interval(to_ours.t_interval)}{bounds})"
    finals = [run.final for run in runs]
    yield f"{mean(finals):.3f}" + (f" ± {stdev(finals):.3f}" if len(finals) > 1 else "")
    gained = paired_difference([run.final for run in paired[OURS]], finals)
    yield f"{gained.value:.3f} ({interval(gained.t_interval, 3)})"
    yield f"{sum(run.broke for run in runs)} of {len(runs)}"


def costs_told(
    study: Study, task: str, paired: Mapping[str, Sequence[Outcome]], threshold: float
) -> Iterator[str]:
    """The table of seconds, passes and tokens, and where the price of a rollout is from."""
    timed, machines = timing.of(task), hardware(study.everything(task))
    yield "What it took to the threshold.\n"
    rows = []
    for arm, runs in paired.items():
        price, speed_up = _price(arm, paired, threshold, timed)
        rows.append([
            arm,
            f"{mean(costs.seconds(run, threshold) for run in runs):,.0f}",
            f"{price.value:.2f} ({interval(price.t_interval)})",
            f"{speed_up[0]:.2f} ({interval(speed_up[1])})",
            f"{mean(costs.passes(run, threshold) for run in runs):,.0f}",
            f"{mean(costs.tokens(run, threshold) for run in runs):,.0f}",
            made_with(runs, machines),
        ])  # fmt: skip
    yield from table(_COST_HEAD, rows)
    own = (
        "from these runs, which were made at different moments, two at a time: the mean over pairs "
        "of seeds, whose interval has what else the machine did in it (`study.py --timing` times "
        "the arms in turns)"
    )
    yield (
        "\nCost of a rollout: seconds of a train step by its rollouts, in GRPO's, "
        + (timed.told if timed else own)
        + ". Speed-up: GRPO's seconds by the arm's. Both with t intervals, and without the first "
        "step of each run, which also sets things up"
        + (f"; all on {machines[0]}" if len(machines) == 1 else "")
        + ".\n"
    )


def _price(
    arm: str,
    paired: Mapping[str, Sequence[Outcome]],
    threshold: float,
    timed: timing.Timing | None,
) -> tuple[PairedRatio, tuple[float, tuple[float, float]]]:
    """What a rollout costs, in GRPO's, and the speed-up with its interval."""
    runs, base, most = paired[arm], paired[BASE], _budget(paired)
    if timed:
        rollouts = paired_ratio(
            [run.reached(threshold) for run in base], [run.reached(threshold) for run in runs],
            budget=most,
        )  # fmt: skip
        price = timed.cost(arm, BASE)
        return price, quotient(rollouts, price)
    price = paired_ratio(
        [costs.a_rollout(run) for run in runs], [costs.a_rollout(run) for run in base], budget=most
    )
    mine, its = (
        [costs.seconds_of(run, threshold, budget=most) for run in side] for side in (runs, base)
    )
    speed_up = paired_ratio(its, mine, budget=most)
    return price, (speed_up.value, speed_up.t_interval)


def _budget(paired: Mapping[str, Sequence[Outcome]]) -> float:
    """Rollouts of a whole run."""
    return max(run.evals[-1][0] for runs in paired.values() for run in runs)


def ablations(study: Study, task: str) -> Iterator[str]:
    """Accuracy averaged over the evaluations, for each point of the grids; maps of those with two
    settings."""
    settings = study.settings["ablations"]
    lr, machines = study.frozen(task)["lrs"][settings["of"]], hardware(study.everything(task))
    found = {
        arm: runs
        for arm in study.ablation_arms()
        if (runs := study.outcomes(task, arm, lr, settings["seeds"]))
    }
    if not found:
        return
    yield f"Ablations of {settings['of']} at lr {lr:g}.\n"
    head = ("arm", "seeds", "mean accuracy", "final", "made with")
    yield from table(
        head,
        (
            [arm, str(len(runs)), f"{mean(run.score for run in runs):.3f}",
             f"{mean(run.final for run in runs):.3f}", made_with(runs, machines)]
            for arm, runs in found.items()
        ),
    )  # fmt: skip
    yield ""
    for grid in settings["grids"]:
        if len(grid) == 2:
            yield from _mapped(task, grid, found)


def _mapped(
    task: str, grid: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Outcome]]
) -> Iterator[str]:
    """A picture of a grid of two settings, as far as its arms have run."""
    (first, rows), (second, columns) = grid.items()
    runs = {
        (row, column): found[name]
        for row in rows
        for column in columns
        if (name := point_name({first: row, second: column})) in found
    }
    if not runs:
        return
    panels = {
        "mean accuracy": {place: mean(run.score for run in those) for place, those in runs.items()},
        "final accuracy": {
            place: mean(run.final for run in those) for place, those in runs.items()
        },
    }
    names = [key.rpartition(".")[2] for key in grid]
    picture = IMAGES / f"study-{task}-ablation.png"
    pictures.heat_maps(panels, (names[0], rows), (names[1], columns), picture)
    yield f"![Accuracy by {names[0]} and {names[1]}, {task}](images/{picture.name})\n"
