"""The comparison of one case: runs in turn, and the row that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.versus import ours, theirs
from benchmarks.versus.cases import Case, Material, Step
from benchmarks.versus.ours import PHASES, OurStep
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.planner.time import forward_flops

HEADER = (
    "case | TRL s | its layout | ours s | TRL / ours | to reach | reached | share of GEMM peak: "
    "passes | to reach | reached | TRL's | tokens a response | TRL's"
)
_BACKWARD = 2
"""Forwards that a backward is."""
LEAST_SHARE = 0.7
"""Share of the GEMM peak, measured in the same run, that the passes are to reach."""


@dataclass(kw_only=True, slots=True)
class Runs:
    """The steady steps of both trainers."""

    ours: list[OurStep] = field(default_factory=list)
    trl: dict[str, list[Step]] = field(default_factory=dict)
    """Rows by the name of their layout."""


def take_turns(
    python: Path,
    case: Case,
    material: Material,
    layouts: Sequence[theirs.Layout],
    *,
    rounds: int,
    num_steps: int,
) -> Runs:
    """Whole runs of ours and of TRL in these layouts, round after round, each round from another
    one on. Each gives all its steps but the first two."""
    found = Runs()

    def run_ours(log: Path) -> None:
        found.ours += ours.run(material, num_steps, case.lr, log)[1:]

    def run_trl(layout: theirs.Layout, log: Path) -> None:
        steps = theirs.run(python, layout, case, material, num_steps, case.lr, log)
        found.trl.setdefault(layout.name, []).extend(steps[1:])

    arms: list[Callable[[Path], None]] = [run_ours, *(partial(run_trl, one) for one in layouts)]
    for number in range(rounds):
        for index in range(len(arms)):
            arm = (index + number) % len(arms)
            arms[arm](material.config.parent / f"{number}-{arm}.log")
    return found


def row_of(case: Case, material: Material, runs: Runs, peak_flops: float) -> dict[str, Any]:
    """Figures of a case."""
    layouts = {name: median(step.seconds for step in steps) for name, steps in runs.trl.items()}
    layout = min(layouts, key=lambda name: layouts[name])
    mine, steady = median(step.seconds for step in runs.ours), runs.trl[layout]
    ratio = layouts[layout] / mine
    responses = fmean(step.response_tokens for step in runs.ours)
    prompts = fmean(step.tokens for step in runs.ours) / case.num_rollouts - responses
    # Operations of one forward of the batch; both make the same sweeps.
    forward = _forward_flops(material, case, prompts + responses)
    their_forward = _forward_flops(material, case, prompts + _tokens(steady))
    sweep = 1 + _BACKWARD
    old_logprobs = 1 - 1 / case.minibatches  # the first minibatch's come from the first pass
    floor_s = sweep * case.sweeps * forward / peak_flops
    share = median(floor_s / step.passes_s for step in runs.ours)
    return {
        "case": case.name,
        "says": case.says,
        "num_rollouts": case.num_rollouts,
        "sweeps": case.sweeps,
        "trl_s": layouts[layout],
        "trl_layout": layout,
        "trl_layouts_s": layouts,
        "ours_s": mine,
        "ratio": ratio,
        "least_ratio": case.least_ratio,
        "reached": ratio >= case.least_ratio,
        "phases_s": {name: median(step.phases_s[name] for step in runs.ours) for name in PHASES},
        "trl_rollouts_s": median(step.rollouts_s for step in steady),
        "trl_passes_s": median(step.passes_s for step in steady),
        "passes_of_peak": share,
        "least_share": LEAST_SHARE,
        "share_reached": share >= LEAST_SHARE,
        "trl_passes_of_peak": median(
            sweep * case.sweeps * their_forward / peak_flops / step.passes_s for step in steady
        ),
        "passes_floor_s": floor_s,
        "logprob_floor_s": old_logprobs * forward / peak_flops,
        "prompt_tokens": prompts,
        "response_tokens": responses,
        "trl_response_tokens": _tokens(steady),
        "ours_steps_s": [round(step.seconds, 4) for step in runs.ours],
        "trl_steps_s": {n: [round(s.seconds, 4) for s in steps] for n, steps in runs.trl.items()},
    }


def _tokens(steps: Sequence[Step]) -> float:
    return fmean(step.response_tokens for step in steps)


def _forward_flops(material: Material, case: Case, length: float) -> float:
    shape = model_shape(read_hf_config(material.model))
    return forward_flops(shape, length) * length * case.num_rollouts


def line(row: dict[str, Any]) -> str:
    """A row below `HEADER`."""
    return (
        f"{row['case']} | {row['trl_s']:.2f} | {row['trl_layout']} | {row['ours_s']:.2f} | "
        f"{row['ratio']:.2f} | {row['least_ratio']:g} | {_verdict(row['reached'])} | "
        f"{row['passes_of_peak']:.0%} | {row['least_share']:.0%} | "
        f"{_verdict(row['share_reached'])} | {row['trl_passes_of_peak']:.0%} | "
        f"{row['response_tokens']:.0f} | {row['trl_response_tokens']:.0f}"
    )


def _verdict(reached: bool) -> str:
    return "yes" if reached else "NO"


def where_time_goes(row: dict[str, Any]) -> str:
    """Our phases, the floors under them, and what is seen of TRL's."""
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["phases_s"].items())
    return (
        f"{row['case']}: {phases} s; at the GEMM peak the passes would take "
        f"{row['passes_floor_s']:.2f} s, the old log-probs {row['logprob_floor_s']:.2f} s. TRL: "
        f"until its rewards {row['trl_rollouts_s']:.2f}, passes {row['trl_passes_s']:.2f} s"
    )
