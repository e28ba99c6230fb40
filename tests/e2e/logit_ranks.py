"""Run under torchrun at PP=2: Megatron's packed logits of a Hugging Face model beside transformers'
own, worst difference relative to the largest logit, as JSON. test_demo.py reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfpo_megatron.batching import PackRow, pack
from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from sfpo_megatron.mcore.setup import LRSchedule, build_policy, init_distributed
from sfpo_megatron.types import Minibatch

TEXTS = (
    "The capital of France is",
    "What is 7 times 8? Give only the number.",
    "Alice has three brothers and two sisters. How many sisters does her brother have?",
)


def reference(model: str, sequences: list[list[int]]) -> Tensor:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([net(torch.tensor([ids])).logits[0] for ids in sequences])


def main(model: str, out: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    # Before the CPU bridge changes torch under transformers.
    expected = reference(model, sequences)
    config = RunConfig(
        output_dir=str(Path(out).parent / "run"),
        model=ModelConfig(path=model),
        parallel=ParallelConfig(pipeline=2),
        data=DataConfig(train=(DataSource(source="jsonl", path="unused.jsonl"),)),
    )
    capabilities = init_distributed(config)
    from sfpo_megatron.mcore import passes

    schedule = LRSchedule(peak=0.0, floor=0.0, warmup_ticks=0, total_ticks=1, style="constant")
    policy = build_policy(config, capabilities, schedule, model_path=model)
    rows = [
        PackRow(
            token_ids=torch.tensor(ids),
            prompt_length=1,
            advantage=0.0,
            generator_logprobs=torch.zeros(len(ids) - 1),
            response_mask=torch.ones(len(ids) - 1, dtype=torch.bool),
        )
        for ids in sequences
    ]
    minibatch = Minibatch(
        microbatches=(pack(rows),),
        global_valid_tokens=1,
        global_num_sequences=1,
        global_tokens=1,
        global_padded_tokens=1,
    )

    def logits_of(policy: Any, logits: Tensor, microbatch: Any) -> Tensor:
        return logits

    with torch.no_grad():
        found = passes._schedule(policy, minibatch, logits_of, forward_only=True)
    if found:
        got = found[0][:, : policy.shape.vocab_size].float()
        worst = ((got - expected).abs().max() / expected.abs().max()).item()
        figures = {"worst_relative_difference": worst, "tokens": got.shape[0], "layout": "PP2"}
        Path(out).write_text(json.dumps(figures))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
