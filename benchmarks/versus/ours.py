"""This trainer on a case: `sfpo-megatron train`, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import provenance
from benchmarks.versus.cases import Material, Step

PHASES = ("generate", "reward", "logprob", "passes", "reposition", "refit")


@dataclass(kw_only=True, frozen=True, slots=True)
class OurStep(Step):
    """A train step, with what metrics.jsonl says of it."""

    phases_s: dict[str, float]
    """Seconds by phase, of `PHASES`."""
    num_passes: int
    tokens: float
    """Prompt and response tokens of the batch."""


def run(
    material: Material, num_steps: int, lr: float, log: Path, *, seed: int = 0
) -> list[OurStep]:
    """All steps of a run but the first, whose start is not seen."""
    found: list[OurStep] = []
    last_s = 0.0
    for at_s, line in _lines(material, num_steps, lr, log, seed):
        if last_s:
            found.append(_step(line, at_s - last_s))
        last_s = at_s
    return found


def _lines(
    material: Material, num_steps: int, lr: float, log: Path, seed: int
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(When it came, a train step's line) of a run."""
    command = [
        *(sys.executable, "-m", "sfpo_megatron", "train", "--json", "--fresh"),
        *(str(material.config), f"model.path={material.model}"),
        *(f"train.num_steps={num_steps}", f"train.optimizer.lr={lr}", f"seed={seed}"),
    ]
    variables = os.environ | {"PYTHONPATH": str(provenance.ROOT)}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=provenance.ROOT, env=variables, stdout=subprocess.PIPE, stderr=errors,
            text=True, bufsize=1,
        )  # fmt: skip
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text)
            if "loss" in line:
                yield time.perf_counter(), line
    if process.wait():
        raise RuntimeError(
            f"sfpo-megatron ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        )


def _step(line: dict[str, Any], seconds: float) -> OurStep:
    phases = {name: line.get(f"time/{name}_s", 0.0) for name in PHASES}
    tokens = line["speed/training_tokens_per_s"] * phases["passes"] / line["num_passes"]
    return OurStep(
        seconds=seconds,
        rollouts_s=phases["generate"] + phases["reward"],
        passes_s=phases["passes"],
        response_tokens=line["response_tokens_mean"],
        accuracy=line["accuracy"],
        phases_s=phases,
        num_passes=line["num_passes"],
        tokens=tokens,
    )
