"""A look at rollouts: what a policy answers to held-out prompts, sampled by transformers."""

from __future__ import annotations

from pathlib import Path

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import eval_prompts
from sfpo_megatron.rewards.last_number import score


def rollouts_of(model_dir: Path, config: RunConfig, *, num: int) -> str:
    """The first `num` prompts of data.eval with a response, the reference and the reward, as text.
    Sampled as a run of `config` samples, from its seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    torch.manual_seed(config.seed)
    shown = []
    for prompt in eval_prompts(config, tokenizer)[:num]:
        ids = torch.tensor([prompt.token_ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=config.rollout.max_response_tokens,
        )
        response = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        question = tokenizer.decode(prompt.token_ids).strip().splitlines()[-1]
        reward = score(response, prompt)
        shown.append(
            f"prompt     {question}\n"
            f"response   {response.strip().replace(chr(10), chr(10) + ' ' * 11)}\n"
            f"reference  {prompt.answer}\n"
            f"reward     {reward:g}\n"
        )
    return "\n".join(shown)
