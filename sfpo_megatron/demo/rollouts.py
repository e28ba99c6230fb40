"""A look at rollouts: what a policy answers to held-out prompts, sampled by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import eval_prompts
from sfpo_megatron.rewards.last_number import score
from sfpo_megatron.types import Prompt

_INDENT = 11


class Sampled(NamedTuple):
    """A response and its reward."""

    prompt: Prompt
    response: str
    reward: float


def sample(policy: Path, config: RunConfig, *, num: int | None = None) -> list[Sampled]:
    """A response to each of the first `num` prompts of data.eval (None: all), at temperature 1 and
    from the run's seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    prompts = eval_prompts(config, tokenizer)[:num]
    asked = tokenizer.pad({"input_ids": [list(p.token_ids) for p in prompts]}, return_tensors="pt")
    torch.manual_seed(config.seed)
    tokens = model.generate(
        **asked, do_sample=True, top_k=0, max_new_tokens=config.rollout.max_response_tokens
    )
    found = tokenizer.batch_decode(
        tokens[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [Sampled(p, text, score(text, p)) for p, text in zip(prompts, found, strict=True)]


def as_text(sampled: list[Sampled]) -> str:
    """The last line of each question, the response, the reference and the reward."""
    blocks = [
        {
            "prompt": one.prompt.question.strip().splitlines()[-1],
            "response": one.response.strip().replace("\n", f"\n{' ' * _INDENT}"),
            "reference": one.prompt.answer,
            "reward": f"{one.reward:g}",
        }
        for one in sampled
    ]
    return "\n".join(
        "".join(f"{name:{_INDENT}}{text}\n" for name, text in block.items()) for block in blocks
    )
