"""An agent with the openai client plays episodes on a real engine, through the rollout endpoint.

What the engine says of every turn is held to transformers over the whole rollout, as the trainer
will compute it. Not exercised: several engines and their loss (tests/e2e/test_tools.py), errors of
the protocol (tests/unit/test_endpoint.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
from made.tool_templates import tool_tokenizer

from sfpo_megatron.demo.tiny_model import TinyModel, write_model
from sfpo_megatron.rollout.reports import environment_metrics

AGENT = """
from openai import AsyncOpenAI

async def two_turns(base_url, api_key, prompt, seed, *, question=""):
    "A turn that is cut, and one more."
    messages = [{"role": "user", "content": question}]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        for limit in (5, None):
            answer = await client.chat.completions.create(
                model="policy", messages=messages, max_tokens=limit, temperature=1.0
            )
            messages += [answer.choices[0].message, {"role": "user", "content": "Go on."}]
    return {"reward": 0.25, "messages": len(messages)}
"""


def test_an_agent_makes_trainable_rollouts(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of both turns are within 1e-4 of transformers'; what the agent says is not trained
    on; each rollout is there once."""
    from transformers import AutoModelForCausalLM

    tokenizer = tool_tokenizer()
    write_model(tokenizer, tmp_path / "model", TinyModel(max_positions=512), seed=0)
    (tmp_path / "talking_agent.py").write_text(AGENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    args = {"agent": "talking_agent:two_turns", "agent_args": {"question": "What is 6*7?"}}
    client = start(
        tmp_path / "model", chat_template=True, environment="agent", environment_args=args
    )
    client.wait_ready(300)
    request = fleet.make_request("talks", temperature=1.0, max_response_tokens=90)
    client.submit(request)
    made = client.collect("talks")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    prompt = "<|im_start|>user\nWhat is 6*7?<|im_end|>\n<|im_start|>assistant\n"
    told = "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    assert sorted({(r.prompt_id, r.sample) for r in made}) == [
        (prompt.id, sample) for prompt in request.prompts for sample in range(2)
    ]
    for rollout in made:
        mask, ids = torch.tensor(rollout.response_mask), torch.tensor(rollout.token_ids)
        assert tokenizer.decode(rollout.prompt_token_ids) == prompt
        assert told.endswith(tokenizer.decode(ids[~mask])) and not mask.all()
        assert mask[:5].sum() == 5 or ids[int(mask.int().argmin()) - 1] == tokenizer.eos_token_id
        whole = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = model(whole).logits[0, len(rollout.prompt_token_ids) - 1 : -1].double()
        wanted = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        found = torch.tensor(rollout.generator_logprobs, dtype=torch.float64)
        assert (wanted - found)[mask].abs().max() < 1e-4
    metrics = environment_metrics(made)
    names = ("turns", "branches", "stop_answered", "reward", "messages")
    assert [metrics[f"environment/{name}"] for name in names] == [2, 1, 1, 0.25, 5]
