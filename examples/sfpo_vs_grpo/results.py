"""docs/results.md and its pictures, from the committed results (`study.py --results`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import gates
from cells import HERE, Outcome, Study
from pairs import paired_ratio
from tables import table

ROOT = HERE.parents[1]
PAGE, IMAGES = ROOT / "docs/results.md", ROOT / "docs/images"
MARK = "<!-- written by `python examples/sfpo_vs_grpo/study.py --results` from here on -->\n"
BASE, OURS = "grpo", "sfpo"
_HEAD = (
    *("arm", "lr", "rollouts to threshold", "GRPO / arm", "t interval", "bootstrap"),
    "arm / SFPO",
    *("final accuracy", "seconds", "cost of a rollout", "speed-up"),
    *("rollouts in backward passes", "tokens generated", "broke"),
)
_COLORS = ("#9aa3ad", "#2f8f6b", "#d9722b", "#1f5fa8", "#8a4fbf")


def write_page(study: Study) -> None:
    """Write the tables of each task below the reading, which is written by hand and stays."""
    reading = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    parts = [
        reading + MARK + "\n",
        *(part for task in study.tasks for part in task_part(study, task)),
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
    yield f"Tuning, {len(seeds)} seeds: accuracy averaged over the evaluations / final.\n"
    rows = []
    for arm in study.arms:
        cells = []
        for lr in lrs:
            found = study.outcomes(task, arm, lr, seeds)
            told = (
                f"{mean(o.score for o in found):.3f} / {mean(o.final for o in found):.3f}"
                if found
                else ""
            )
            is_best = study.frozen(task).get("lrs", {}).get(arm) == lr
            cells.append(f"**{told}**" if is_best else told)
        rows.append([arm, *cells])
    yield from table(["arm", *(f"lr {lr:g}" for lr in lrs)], rows)
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
    base, ours = (
        [study.outcomes(task, arm, lrs[arm], [seed])[0] for seed in done] for arm in (BASE, OURS)
    )
    rows = []
    for arm in lrs:
        runs = [study.outcomes(task, arm, lrs[arm], [seed])[0] for seed in done]
        rows.append([arm, f"{lrs[arm]:g}", *figures(runs, base, ours, threshold)])
    yield from table(_HEAD, rows)
    yield ""
    yield (
        "GRPO / arm: how many times as many rollouts GRPO needs; arm / SFPO: the arm, as SFPO (t "
        "interval). Cost of a rollout: seconds of a train step by its rollouts, in GRPO's. "
        "Speed-up: GRPO / arm by the cost, on two cores.\n"
    )
    picture = IMAGES / f"study-{task}.png"
    curves(found, threshold, picture, title=task)
    yield f"![Held-out accuracy of the arms against rollouts, {task}](images/{picture.name})\n"
    of = {
        (run.about["commit"][:7], run.about["hardware"]) for runs in found.values() for run in runs
    }
    yield "; ".join(f"commit {commit}, {hardware}" for commit, hardware in sorted(of)) + ".\n"


def figures(
    runs: Sequence[Outcome], base: Sequence[Outcome], ours: Sequence[Outcome], threshold: float
) -> Iterator[str]:
    """The cells of one arm's row; runs of the same seeds as those of GRPO and of SFPO."""
    costs, of_base, of_ours = ([run.reached(threshold) for run in x] for x in (runs, base, ours))
    budget = max(run.evals[-1][0] for run in (*runs, *base))
    reached = [cost for cost in costs if cost is not None]
    missed = len(costs) - len(reached)
    yield (f"{mean(reached):,.0f}" if reached else "-") + (f", never in {missed}" if missed else "")
    ratio = paired_ratio(of_base, costs, budget=budget)
    bound = f" ({ratio.num_bounds} bounds)" if ratio.num_bounds else ""
    yield f"{ratio.value:.2f}{bound}"
    yield interval(ratio.t_interval)
    yield interval(ratio.bootstrap)
    to_ours = paired_ratio(costs, of_ours, budget=budget)
    yield f"{to_ours.value:.2f} ({interval(to_ours.t_interval)})"
    finals = [run.final for run in runs]
    yield f"{mean(finals):.3f}" + (f" ± {stdev(finals):.3f}" if len(finals) > 1 else "")
    yield f"{mean(seconds(run, threshold) for run in runs):,.0f}"
    cost = mean(a_rollout(run) / a_rollout(other) for run, other in zip(runs, base, strict=True))
    yield f"{cost:.2f}"
    yield f"{ratio.value / cost:.2f}"
    yield f"{mean(passes(run, threshold) for run in runs):,.0f}"
    yield f"{mean(tokens(run, threshold) for run in runs):,.0f}"
    yield f"{sum(run.broke for run in runs)} of {len(runs)}"


def _until(run: Outcome, threshold: float) -> float:
    """Train steps until the threshold, all of them where it was not reached."""
    rollouts = run.reached(threshold)
    a_step = run.train[0]["rollouts"]
    return len(run.train) if rollouts is None else rollouts / a_step


def seconds(run: Outcome, threshold: float) -> float:
    """Seconds of the train steps until the threshold."""
    return _until(run, threshold) * mean(line["step_s"] for line in run.train)


def a_rollout(run: Outcome) -> float:
    """Seconds of a train step for each of its rollouts."""
    return mean(line["step_s"] / run.train[0]["rollouts"] for line in run.train)


def passes(run: Outcome, threshold: float) -> float:
    """Rollouts that passes over their batches were made with until the threshold, once a pass: a
    quarter of a batch costs a quarter."""
    a_step = run.train[0]["rollouts"]
    return _until(run, threshold) * a_step * mean(line["passes"] for line in run.train)


def tokens(run: Outcome, threshold: float) -> float:
    """Generated for training until the threshold."""
    a_step = run.train[0]["rollouts"]
    return _until(run, threshold) * a_step * mean(line["tokens"] for line in run.train)


def ablations(study: Study, task: str) -> Iterator[str]:
    """Accuracy averaged over the evaluations, for each point of the grids."""
    settings = study.settings["ablations"]
    lr = study.frozen(task)["lrs"][settings["of"]]
    rows = []
    for arm in study.ablation_arms():
        found = study.outcomes(task, arm, lr, settings["seeds"])
        if found:
            scores = (mean(o.score for o in found), mean(o.final for o in found))
            rows.append([arm, str(len(found)), *(f"{score:.3f}" for score in scores)])
    if rows:
        yield f"Ablations of {settings['of']} at lr {lr:g}.\n"
        yield from table(["arm", "seeds", "mean accuracy", "final"], rows)
        yield ""


def curves(found: dict[str, list[Outcome]], threshold: float, picture: Path, *, title: str) -> None:
    """Mean held-out accuracy against rollouts, with the band of all seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (arm, runs) in zip(_COLORS, found.items(), strict=False):
        length = min(len(run.evals) for run in runs)
        x = [rollouts for rollouts, _ in runs[0].evals[:length]]
        columns = [[run.evals[i][1] for run in runs] for i in range(length)]
        axes.plot(x, [mean(c) for c in columns], color=color, linewidth=2, label=arm)
        axes.fill_between(
            x, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15
        )
    axes.axhline(threshold, color="#555", linewidth=1, linestyle="--")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("rollouts")
    axes.set_ylabel("held-out accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(picture, dpi=140)


def interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"
