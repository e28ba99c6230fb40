"""Stage `engines`: engines that share the trainer's device, as a user runs them.

Two train steps of the command line, colocated, by each transport that a device has; after each the
engine gets the new weights and answers greedily. A fresh engine on the exported weights has to
answer the same. A refit by our own transport is also compared parameter by parameter
(`refit.verify_every`); vLLM's own receivers compute no checksums.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.demo_run import demo_run
from benchmarks.common.provenance import ROOT
from sfpo_megatron.config.rollout import RefitConfig, Transport
from sfpo_megatron.outputs.directory import RunDirectory

TRANSPORTS: dict[str, tuple[Transport, ...]] = {"cuda": ("shm", "ipc"), "cpu": ("shm",)}


def fingerprint(response: str, prompt: Any) -> float:
    """A reward by which no two responses are alike: its mean tells whether all are the same."""
    return zlib.crc32(response.encode()) / 2**32


def run(device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [*demo_run(folder), *settings(device)]
        return {which: cycle(folder, words, which) for which in TRANSPORTS[device.type]}


def settings(device: torch.device) -> list[str]:
    """What the train steps and the fresh engine have in common."""
    return [
        f"model.dtype={'bfloat16' if device.type == 'cuda' else 'float32'}",
        *("data.eval.0.size=64", "eval.every=1", "eval.temperature=0"),
        *("parallel.data=1", "rollout.placement=colocated", "rollout.reproducible=true"),
        *("train.num_steps=2", "train.prompts_per_step=8"),
        "train.optimizer.lr=0.02",  # so that each step changes the greedy answers
        "reward.function=benchmarks.device_stages.engines:fingerprint",
    ]


def refit_by(transport: Transport) -> list[str]:
    """This transport, with its checksums where it has any."""
    checked = int(not RefitConfig(transport=transport).is_vllms_own)
    return [f"refit.transport={transport}", f"refit.verify_every={checked}"]


def cycle(folder: Path, words: list[str], transport: Transport) -> dict[str, float]:
    """Train by a transport; AssertionError if a fresh engine answers otherwise."""
    run, begun = RunDirectory(folder / transport), time.monotonic()
    command("train", *words, *refit_by(transport), f"output_dir={run.path}")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evals = [line["eval/reward_mean"] for line in lines if "eval/reward_mean" in line]
    assert len(steps) == 2 and all(line["grad_norm"] > 0 for line in steps), steps
    assert len(set(evals)) == 3, f"the engine answers as before: {evals}"
    fresh = RunDirectory(folder / f"{transport}-fresh")
    command("eval", *words, f"model.path={run.hf}", f"output_dir={fresh.path}")
    (answer,) = fresh.evals.read_text().splitlines()
    expected = json.loads(answer)["eval/reward_mean"]
    assert evals[-1] == expected, f"found {evals[-1]}, of a fresh engine {expected}"
    seconds = {name: steps[-1][f"time/{name}_s"] for name in ("refit", "onload", "offload")}
    return {"greedy_fingerprint": expected, "seconds": time.monotonic() - begun, **seconds}


def command(name: str, config: str, *words: str) -> None:
    """A command of ours, whose output is the stage's."""
    line = [sys.executable, "-m", "sfpo_megatron", name, config, *words]
    subprocess.run(line, cwd=ROOT, stdout=sys.stderr, check=True)
