"""After every refit, the running engine is the engine that a fresh start on the export would be.

The whole path: SFPO steps on Megatron shards, MegatronWeightSource, shm transport, live AsyncLLM;
reference: a fresh vLLM on the exported Hugging Face directory. Not exercised: DP > 1 with
overlap (tests/dist compares its exports).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import digits
import pytest

HERE = Path(__file__).parent
LOGPROB_TOLERANCE = 1e-4
"""The running engine decodes the prompts together, the fresh one alone: kernels round apart."""


def run_trained_refit(
    folder: Path,
    *,
    tied: bool,
    tensor: int,
    pipeline: int,
    engine_tensor: int,
    num_steps: int,
    expert: int = 1,
    transport: str = "auto",
) -> None:
    num_experts = 4 if expert > 1 else 0
    model = digits.make_model(
        folder / "model", tied=tied, layers=2 * pipeline, num_experts=num_experts
    )
    config = digits.write_config(
        folder,
        model,
        parallel={"data": expert, "tensor": tensor, "pipeline": pipeline, "expert": expert},
        rollout={
            "tensor_parallel": engine_tensor,
            "max_prompt_tokens": 100,
            "max_response_tokens": 20,
            "engine_args": {"block_size": 32},
        },
        refit={"bucket_bytes": 100_000, "transport": transport, "verify_every": 1},
    )
    ranks = tensor * pipeline * expert
    script = [str(HERE / "refit_ranks.py"), str(config), str(num_steps)]
    (folder / "run").mkdir()
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), *script),
        ],
        env=os.environ
        | {
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        },
        check=True,
        timeout=300,
        stderr=subprocess.PIPE,
        text=True,
    )
    for step in range(1, num_steps + 1):
        run = folder / "run"
        assert_same(run / f"hf_{step}", run / f"greedy_{step}.json", engine_tensor)


def assert_same(exported: Path, recorded: Path, engine_tensor: int) -> None:
    fresh = subprocess.run(
        [
            *(sys.executable, str(HERE / "fresh_engine.py")),
            *(str(exported), str(recorded), str(engine_tensor)),
        ],
        check=True,
        timeout=120,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    line = next(x for x in fresh.splitlines() if x.startswith("ANSWERS "))
    expected = json.loads(line.removeprefix("ANSWERS "))
    found = json.loads(recorded.read_text())
    assert [tokens for _, tokens, _ in found] == [tokens for _, tokens, _ in expected]
    for (_, _, a), (_, _, b) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=LOGPROB_TOLERANCE)


@pytest.mark.full
def test_tensor_parallel_trainer_tied(tmp_path: Path) -> None:
    run_trained_refit(tmp_path, tied=True, tensor=2, pipeline=1, engine_tensor=1, num_steps=1)


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("engine_tensor", [1, 2])
def test_every_layout(
    tmp_path: Path, tied: bool, tensor: int, pipeline: int, engine_tensor: int
) -> None:
    run_trained_refit(
        tmp_path,
        tied=tied,
        tensor=tensor,
        pipeline=pipeline,
        engine_tensor=engine_tensor,
        num_steps=3,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("tensor", "pipeline", "expert", "engine_tensor"), [(1, 2, 1, 2), (1, 1, 2, 1), (2, 1, 1, 1)]
)
def test_stages_stream_at_the_same_time(
    tmp_path: Path, tensor: int, pipeline: int, expert: int, engine_tensor: int
) -> None:
    """transport gloo: PP2 and EP2 have two leaders, TP2 one; the class is nccl_stages' own."""
    run_trained_refit(
        tmp_path,
        tied=pipeline == 1 and expert == 1,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        engine_tensor=engine_tensor,
        num_steps=2,
        transport="gloo",
    )
