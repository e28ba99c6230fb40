"""A vLLM engine of its own process, started on a directory: what it says to given prompts, as JSON.

`python fresh_engine.py MODEL GREEDY.json TENSOR_PARALLEL [DTYPE]`: reads the prompts and lengths of
GREEDY.json ([[prompt, tokens, logprobs], ...]) and prints its own in the same form.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(model: str, recorded: str, tensor_parallel: int, dtype: str = "float32") -> None:
    from sfpo_megatron.rollout.actor_variables import actor_variables
    from sfpo_megatron.rollout.lifeline import Lifeline

    _lifeline = Lifeline()  # vLLM leaves its tensor-parallel buffers in /dev/shm
    os.environ.update(actor_variables("engine", on_gpu=False, is_restart=True))
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=128,
        block_size=32,
        enforce_eager=True,
        tensor_parallel_size=tensor_parallel,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
    )
    prompts = [prompt for prompt, _, _ in json.loads(Path(recorded).read_text())]
    parameters = SamplingParams(
        temperature=0.0, max_tokens=16, logprobs=0, detokenize=False, stop_token_ids=[1]
    )
    answers = []
    for prompt in prompts:
        request = {"prompt_token_ids": prompt}
        output = llm.generate([request], parameters, use_tqdm=False)[0].outputs[0]
        logprobs = [
            at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)
        ]
        answers.append([prompt, list(output.token_ids), logprobs])
    print("ANSWERS " + json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
