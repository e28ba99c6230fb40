"""Episodes of several turns repeat bit for bit: `rollout.reproducible`, on real engines.

Tools take a time that chance decides, and so does what ends first. Not exercised: the order of
calls by itself (tests/unit/test_lockstep.py), CUDA, where equal batches do not give equal bits.
"""

from __future__ import annotations

import signal
from pathlib import Path

import digits
import pytest
from made.same_run import assert_same_run, lines
from made.tool_templates import tool_tokenizer
from made.waiting import wait_for

from sfpo_megatron.demo.tiny_model import TinyModel, write_model
from sfpo_megatron.outputs.stopping import STOPPED_EXIT_CODE

OWN = """
import asyncio, os, random
from dataclasses import replace
from pathlib import Path

import psutil

from sfpo_megatron.rollout.environments.tool_calls import ToolCall
from sfpo_megatron.rollout.environments.tool_environment import ToolEnvironment

KILL = Path(__file__).with_name("kill")
chance = random.SystemRandom()


class Short:
    "Turns of a few tokens that count as ended: a random model hardly ends any."

    def __init__(self, generate, seed):
        self.generate, self.context_tokens = generate, generate.context_tokens
        self.num_tokens = 2 + seed % 4

    async def __call__(self, token_ids):
        return replace(await self.generate(token_ids, max_tokens=self.num_tokens), finished=True)


class Sums(ToolEnvironment):
    async def run(self, prompt, generate, seed):
        await asyncio.sleep(chance.choice([0, 0.02]))
        return await super().run(prompt, Short(generate, seed), seed)

    def calls_in(self, turn):
        if len(turn) % 3 == 0:
            return []
        return [ToolCall(name="calculator", arguments={"expression": f"{len(turn)}*1000"})]

    async def respond(self, prompt, turns):
        told = await super().respond(prompt, turns)
        await asyncio.sleep(chance.choice([0, 0, 0.05]))
        if len(turns) == 2 and KILL.exists():
            KILL.unlink()
            actors = psutil.Process(os.getppid()).children()
            next(a for a in actors if " ".join(a.cmdline()).startswith("ray::Engine")).kill()
        return replace(told, reward=0.25 * (len(turns[-1]) % 2))
"""


@pytest.mark.full
def test_a_run_with_tools_repeats_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that is stopped, resumed, and loses an engine in mid-episode has the metrics
    (times aside) and the weights of one without a break."""
    (tmp_path / "sums.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    write_model(tool_tokenizer(), tmp_path / "model", TinyModel(max_positions=512), seed=0)
    config = digits.write_config(
        tmp_path,
        tmp_path / "model",
        parallel={"tensor": 1},
        train={"num_steps": 4, "max_tokens_per_microbatch": 512},
        rollout={
            "environment": "sums:Sums",
            "environment_args": {"tools": ["calculator"], "max_turns": 4},
            "reproducible": True,
            "num_engines": 2,
            "max_prompt_tokens": 300,
            "max_response_tokens": 150,
        },
        data={"chat_template": True},
        checkpoint={"every": 2},
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    digits.train(
        config,
        f"output_dir={straight}",
        timeout_s=400,
        environment=digits.environment(digits.ALONE),
    )

    overrides = (f"output_dir={broken}",)
    process = digits.start_train(config, *overrides, environment=digits.environment(digits.ALONE))
    try:
        wait_for(lambda: lines(broken), timeout_s=400, what="a train step")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=200)
    finally:
        digits.end(process)
    assert process.returncode == STOPPED_EXIT_CODE, output
    (tmp_path / "kill").touch()
    output = digits.train(
        config, *overrides, timeout_s=400, environment=digits.environment(digits.ALONE)
    )
    assert "resumed from" in output and not (tmp_path / "kill").exists()

    (steps, _), (wanted, _) = digits.read_metrics(broken), digits.read_metrics(straight)
    assert_same_run(broken, straight, but=("num_reissued", "num_engine_restarts"))
    assert wanted[-1]["num_reissued"] == 0
    assert steps[-1]["num_reissued"] > 0 and steps[-1]["num_engine_restarts"] == 1
    assert [line["num_rollouts"] for line in steps] == [16 * 8 * n for n in range(1, 5)]
    turns = [line["environment/turns"] for line in wanted]
    assert all(1 < number < 4 for number in turns), "all episodes were of one length"
