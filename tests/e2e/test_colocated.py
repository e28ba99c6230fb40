"""`rollout.placement: colocated` as a user runs it: turns on one machine, one or two engines.

Not exercised here: sleep mode, which vLLM has on GPUs only (its names and their arguments are held
to the installed vllm below), and memory that is really shared; on CPU engines stay awake and the
rest of the path is the same.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
from pathlib import Path
from typing import Any

import digits
import pytest
from made.waiting import wait_for

from sfpo_megatron.outputs.cost_metrics import without_costs

TURNS = {"time/onload_s", "time/offload_s"}
SPREAD = ("max_s", "min_s", "slowest")


def run(folder: Path, model: Path, placement: str, num_engines: int, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    rollout = {"reproducible": True, "placement": placement, "num_engines": num_engines}
    changes = {"rollout": rollout, "eval": {"every": 1}, **changes}
    digits.train(digits.write_config(folder, model, **changes))
    return folder / "run"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_it_is_the_dedicated_run(tmp_path: Path, ranks: int) -> None:
    """Metric for metric, evaluations too, with a checkpoint after every step: the engines' next
    turn begins with a refit of its own then. And the exported weights, bit for bit."""
    model = digits.make_model(tmp_path / "model")
    changes = {
        "parallel": {"tensor": 1, "data": ranks},
        "checkpoint": {"every": 1},
        "train": {"num_steps": 2},
    }
    dedicated = run(tmp_path / "dedicated", model, "dedicated", num_engines=ranks, **changes)
    colocated = run(tmp_path / "colocated", model, "colocated", num_engines=ranks, **changes)
    (train, evals), (other, other_evals) = map(digits.read_metrics, (dedicated, colocated))
    assert [line["step"] for line in train] == [1, 2] and len(evals) == 3
    assert [without_costs(line) for line in train] == [without_costs(line) for line in other]
    assert [without_costs(line) for line in evals] == [without_costs(line) for line in other_evals]
    assert all(line["grad_norm"] > 0 and line["sfpo_active"] for line in train)
    compared = {
        f"ranks/{phase}_{what}" for phase in ("onload", "offload") for what in SPREAD if ranks > 1
    }
    for line, plain in zip(other, train, strict=True):
        assert line.keys() - plain.keys() == TURNS | compared
        assert all(math.isfinite(line[name]) and line[name] > 0 for name in TURNS)
    assert _weights(dedicated) == _weights(colocated)


def _weights(run_directory: Path) -> bytes:
    return (run_directory / "hf" / "model.safetensors").read_bytes()


@pytest.mark.full
def test_engines_that_die_in_their_turn(tmp_path: Path) -> None:
    """Both, while they generate: the trainer comes back to send the weights, and the run ends with
    every step whole."""
    rollout = {
        "reproducible": True,
        "placement": "colocated",
        "num_engines": 2,
        "max_restarts": 4,
        "max_response_tokens": 200,
    }
    config = digits.write_config(
        tmp_path,
        digits.make_model(tmp_path / "model"),
        parallel={"tensor": 1, "data": 2},
        rollout=rollout,
        train={"max_tokens_per_microbatch": 512},
    )
    process = digits.start_train(config)
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(
            lambda: metrics.exists() and '"loss"' in metrics.read_text(),
            timeout_s=180,
            what="the first train step",
        )
        for engine in digits.engine_processes(process):
            os.kill(engine.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=280)
    finally:
        digits.end(process)
    assert process.returncode == 0, output
    train, _ = digits.read_metrics(tmp_path / "run")
    assert [line["num_rollouts"] for line in train] == [128, 256, 384]
    assert train[-1]["num_engine_restarts"] == 2 and train[-1]["num_reissued"] > 0


def test_the_names_of_vllms_sleep_mode() -> None:
    """What `Engine` calls, and what its order leans on, in the installed vllm."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import SLEEP_TAGS, Executor
    from vllm.v1.worker.gpu_worker import Worker

    def parameters(function: Any) -> set[str]:
        return set(inspect.signature(function).parameters)

    assert "enable_sleep_mode" in inspect.signature(AsyncEngineArgs).parameters
    assert {"level", "mode"} <= parameters(AsyncLLM.sleep) and "tags" in parameters(
        AsyncLLM.wake_up
    )
    assert inspect.iscoroutinefunction(AsyncLLM.sleep)
    assert inspect.iscoroutinefunction(AsyncLLM.wake_up)
    assert set(SLEEP_TAGS) == {"weights", "kv_cache"}
    # Partly awake, it answers to no request: `Fleet` gives none before "kv_cache".
    assert "tags" in parameters(Executor.wake_up) and hasattr(Executor, "is_sleeping")
    assert "fully_awake" in inspect.getsource(EngineCore.wake_up)
    assert {"level"} <= parameters(Worker.sleep) and "tags" in parameters(Worker.wake_up)
    assert current_platform.is_cpu() and current_platform.is_sleep_mode_available() is False
