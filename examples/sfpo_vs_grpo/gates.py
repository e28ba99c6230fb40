"""What the entropy gate would have done in runs that had none, and what it did where it was on.

Its decisions depend on the entropies alone: up to the step at which it closes, a run with the gate
is the run without it, so that the logged entropies say when it closes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from cells import Study
from saved import Outcome
from tables import hardware, made_with, table

from sfpo_megatron.config.tree import SFPOConfig
from sfpo_megatron.gate import EntropyGate


def closing_step(rule: Mapping[str, Any], run: Outcome) -> int | None:
    """The first train step with one pass, if a gate with these settings had watched the run; None
    if it would have stayed open."""
    settings = {key.removeprefix("sfpo."): value for key, value in rule.items()}
    gate = EntropyGate.of(SFPOConfig(**settings))
    for line in run.train:
        if not gate.is_open(line["step"]):
            return int(line["step"])
        gate.observe(line["entropy"])
    return None


def told(study: Study, task: str) -> Iterator[str]:
    """What each rule of study.toml came to: replayed on all confirming runs, and run on some."""
    of, lr = study.settings["gates"]["of"], study.frozen(task)["lrs"][study.settings["gates"]["of"]]
    runs = study.outcomes(task, of, lr, study.confirming_seeds(task))
    if not runs:
        return
    yield f"The gate, replayed on the entropies of {len(runs)} runs of {of}, and really run.\n"
    head = (
        *("rule", "closes in", "at step (median)", "run with it", "final", "final without it"),
        "made with",
    )
    yield from table(head, _rows(study, task, of, lr, runs))
    yield ""


def _rows(
    study: Study, task: str, of: str, lr: float, runs: Sequence[Outcome]
) -> Iterator[list[str]]:
    machines = hardware(study.everything(task))
    for name, rule in study.gate_rules().items():
        steps = [step for run in runs if (step := closing_step(rule, run)) is not None]
        cells = [name, f"{len(steps)} of {len(runs)}", f"{median(steps):g}" if steps else "-"]
        pairs = [
            (forks[0], study.outcomes(task, of, lr, [seed])[0])
            for seed in study.fork_seeds(task)
            if (forks := study.outcomes(task, study.gate_arm(name), lr, [seed]))
        ]
        cells.append(str(len(pairs)) if pairs else "-")
        sides = zip(*pairs, strict=True)
        cells += [f"{mean(run.final for run in side):.3f}" for side in sides] or ["-", "-"]
        cells.append(made_with([*runs, *(fork for fork, _ in pairs)], machines))
        yield cells
