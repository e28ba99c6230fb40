"""A digits-only task that a random policy solves now and then: rewards without a warm start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

VOCABULARY = ("<pad>", "<eos>", *"0123456789+=.")  # 15 tokens: not divisible by TP 2
ALONE = ("parallel.tensor=1",)
"""One rank without the launcher, as torchrun would start it."""


def make_model(
    directory: Path,
    *,
    tied: bool = True,
    layers: int = 2,
    num_experts: int = 0,
    latent: bool = False,
) -> Path:
    """A random Qwen2, with experts Qwen3-MoE, or DeepSeek-V3 (`latent`), whose samples spread over
    all 15 tokens."""
    return tiny.make_model(
        directory,
        vocabulary=VOCABULARY,
        tied=tied,
        layers=layers,
        num_experts=num_experts,
        latent=latent,
        initializer_range=0.02,
    )


def write_config(folder: Path, model_path: Path, /, **changes: Any) -> Path:
    """CONFIG.yaml for the task; `changes` are whole sections."""
    data = folder / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = folder / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "9+0=", "answer": "9"}) + "\n")
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(model_path)},
        "parallel": {"tensor": 2},
        "train": {
            "num_steps": 3,
            "prompts_per_step": 16,
            "group_size": 8,
            "minibatches_per_step": 2,
            "max_tokens_per_microbatch": 256,
            "optimizer": {"lr": 1.0e-3},
        },
        "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 8, "timeout_s": 300},
        "data": {
            "train": [{"source": "jsonl", "path": str(data)}],
            "eval": [{"source": "jsonl", "path": str(held_out)}],
        },
        "reward": {"function": "last_number"},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
    }
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def save_rollouts(path: Path, *, num_steps: int, num_prompts: int = 8, group_size: int = 4) -> None:
    """Made-up rollouts for `debug.train_only`: ragged, every group with both rewards."""
    import torch
    from made.batches import make_batch

    from sfpo_megatron.run.saved_rollouts import RolloutSaver

    random, saver = torch.Generator().manual_seed(0), RolloutSaver(str(path))
    for step in range(1, num_steps + 1):
        prompts = torch.randint(2, 9, (num_prompts,), generator=random)
        prompts = prompts.repeat_interleave(group_size)
        responses = torch.randint(1, 9, prompts.shape, generator=random)
        rewards = torch.tensor([0.0, 1.0]).repeat(prompts.numel() // 2)
        size = int((prompts + responses).sum())
        batch = make_batch(
            prompts,
            responses,
            torch.randint(2, len(VOCABULARY), (size,), generator=random),
            group_size=group_size,
            generator_logprobs=-2.0,
            rewards=rewards,
            weight_version=step - 1,
        )
        saver.add(step, batch)


def start_train(
    config: Path,
    *overrides: str,
    environment: dict[str, str] | None = None,
    command: str = "train",
) -> subprocess.Popen[str]:
    """`sfpo-megatron train` in a session of its own (its signals are not ours)."""
    return subprocess.Popen(
        [sys.executable, "-m", "sfpo_megatron", command, str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(environment or {})},
    )


def train(
    config: Path,
    *overrides: str,
    timeout_s: float = 480,
    environment: dict[str, str] | None = None,
) -> str:
    """Run to the end; the output, or an AssertionError with it. `timeout_s`: a run that hangs; the
    longest takes 190 s beside another suite."""
    process = start_train(config, *overrides, environment=environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    assert process.returncode == 0, output
    return output


def end(process: subprocess.Popen[str]) -> None:
    """End a run that a test is done with, and what it started."""
    family = descendants(process)
    process.send_signal(signal.SIGKILL)
    for member in family:
        if member.is_running():
            member.kill()
    process.wait()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def engine_processes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The actors (Ray titles them) and their EngineCores, as they are now."""
    found = []
    for child in descendants(process):
        try:
            if " ".join(child.cmdline()).startswith("ray::Engine"):
                found.append(child)
                found += [c for c in child.children() if "spawn_main" in " ".join(c.cmdline())]
        except psutil.NoSuchProcess:
            continue
    return found


def environment(overrides: tuple[str, ...]) -> dict[str, str]:
    """What torchrun sets for a rank; the launcher does it where there are more."""
    if overrides != ALONE:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return place | {"MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train lines, eval lines)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "eval/accuracy" in x]
