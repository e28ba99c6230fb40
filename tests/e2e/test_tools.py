"""A run whose model uses tools, on real engines, one of which is killed in mid-episode.

A random model calls no tool by itself: its turns are cut short and stand for calls. Not exercised:
a model's own calls (examples/tool_math), tools that misbehave (tests/unit/test_tools_pool.py).
"""

from __future__ import annotations

from pathlib import Path

import digits
import pytest
import torch
from made.tool_templates import tool_tokenizer
from safetensors.torch import load_file

from sfpo_megatron.demo.tiny_model import TinyModel, write_model

SUMS = """
import os
from dataclasses import replace
from pathlib import Path

import psutil

from sfpo_megatron.rollout.environments.tool_calls import ToolCall
from sfpo_megatron.rollout.environments.tool_environment import ToolEnvironment


class Short:
    "Turns of three tokens that count as ended."

    def __init__(self, generate):
        self.generate, self.context_tokens = generate, generate.context_tokens

    async def __call__(self, token_ids):
        return replace(await self.generate(token_ids, max_tokens=3), finished=True)


class Sums(ToolEnvironment):
    async def run(self, prompt, generate, seed):
        return await super().run(prompt, Short(generate), seed)

    def calls_in(self, turn):
        return [ToolCall(name="calculator", arguments={"expression": f"{len(turn) + 1}*1000"})]

    async def respond(self, prompt, turns):
        told = await super().respond(prompt, turns)
        if len(turns) == 2 and not KILLED.exists():
            KILLED.touch()
            actors = psutil.Process(os.getppid()).children()
            next(a for a in actors if " ".join(a.cmdline()).startswith("ray::Engine")).kill()
        return replace(told, reward=0.25 * (len(turns[-1]) % 2))


KILLED = Path(__file__).with_name("killed")
"""


def test_a_run_with_tools_survives_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of trainer and generator agree over every turn; results are read and not trained
    on; each rollout is there once, with all its turns."""
    (tmp_path / "sums.py").write_text(SUMS)
    monkeypatch.chdir(tmp_path)
    tokenizer = tool_tokenizer()
    write_model(tokenizer, tmp_path / "model", TinyModel(max_positions=512), seed=0)
    config = digits.write_config(
        tmp_path,
        tmp_path / "model",
        parallel={"tensor": 1},
        train={"num_steps": 2, "max_tokens_per_microbatch": 512},
        rollout={
            "environment": "sums:Sums",
            "environment_args": {"tools": ["calculator"], "max_turns": 3},
            "num_engines": 2,
            "max_prompt_tokens": 300,
            "max_response_tokens": 150,
        },
        data={"chat_template": True},
        debug={"save_rollouts": str(tmp_path / "rollouts.safetensors")},
    )
    digits.train(config, environment=digits.environment(digits.ALONE))
    assert (tmp_path / "killed").exists()
    lines, _ = digits.read_metrics(tmp_path / "run")
    saved = load_file(tmp_path / "rollouts.safetensors")
    assert [line["num_rollouts"] for line in lines] == [16 * 8, 2 * 16 * 8]
    assert lines[-1]["num_engine_restarts"] == 1
    for step, line in enumerate(lines, start=1):
        assert line["logprob_diff_max"] < 1e-4 and line["grad_norm"] > 0
        counts = ("turns", "tool_calls", "tool_errors", "stop_turns")
        assert [line[f"environment/{name}"] for name in counts] == [3, 3, 0, 1]
        assert saved[f"{step}.response_lengths"].numel() == 16 * 8
        mask = saved[f"{step}.response_mask"].split(saved[f"{step}.response_lengths"].tolist())
        generated = [int(part.sum()) for part in mask]
        assert all(3 <= number <= 9 for number in generated)
        assert line["response_tokens_mean"] == sum(generated) / len(generated)
        for part in told_of(saved, step):
            text = tokenizer.decode(part)
            assert text.count("<tool_response>") == 2 and text.count("000\n</tool_response>") == 2


def told_of(saved: dict[str, torch.Tensor], step: int) -> list[torch.Tensor]:
    """The tokens of each rollout that the environment said."""
    prompts, responses = saved[f"{step}.prompt_lengths"], saved[f"{step}.response_lengths"]
    rows = saved[f"{step}.token_ids"].split((prompts + responses).tolist())
    masks = saved[f"{step}.response_mask"].split(responses.tolist())
    return [
        row[length:][~mask] for row, length, mask in zip(rows, prompts.tolist(), masks, strict=True)
    ]
