"""Published step breakdowns, to hold the roofline against. No torch.

Sources: NVIDIA-NeMo/RL issue 959 (NeMo-RL v0.3 on H100; grpo_math_8B_megatron.yaml and
grpo_math_70B_megatron.yaml: 64 prompts x 32, at most 4096 tokens, minibatches of 512; policy and
reference log-probs) and verl's docs/advance/fully_async.md (Qwen3-30B-A3B-Base, colocated, 128 H20;
512 prompts x 16, responses of at most 8192 tokens; mean and layout are not given: 1600 tokens and
TP4 x EP8 are assumed, and that CUDA graphs were off).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfpo_megatron.config.objective import KLConfig, ObjectiveConfig
from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SFPOConfig,
    TrainConfig,
)
from sfpo_megatron.families.shape import ModelShape, model_shape
from sfpo_megatron.planner.time import Workload

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
LLAMA_8B = model_shape(
    {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    }
)
LLAMA_70B = model_shape(
    {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    }
)
QWEN3_30B_A3B = model_shape(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "vocab_size": 151936,
    }
)


@dataclass(kw_only=True, frozen=True, slots=True)
class Published:
    """One row of a published table."""

    name: str
    shape: ModelShape
    config: RunConfig
    gpu: str
    work: Workload
    seconds: dict[str, float]
    """By the names of StepSeconds."""


def _config(parallel: ParallelConfig, train: TrainConfig, rollout: RolloutConfig) -> RunConfig:
    return RunConfig(
        output_dir="-",
        model=ModelConfig(path="-", dtype="bfloat16"),
        parallel=parallel,
        train=train,
        sfpo=SFPOConfig(num_fast_passes=0),
        # In the reward: only then do we, as they do, compute the log-probs of every minibatch.
        objective=ObjectiveConfig(kl=KLConfig(coef=0.01, where="reward")),
        rollout=rollout,
        data=DataConfig(train=(DataSource(source="jsonl", path="-"),)),
    )


_NEMO_TRAIN = TrainConfig(
    prompts_per_step=64, group_size=32, minibatches_per_step=4, max_tokens_per_microbatch=4096
)
PUBLISHED = (
    Published(
        name="NeMo-RL, Llama 3.1 8B, 8 H100",
        shape=LLAMA_8B,
        config=_config(
            ParallelConfig(data=4, pipeline=2),
            _NEMO_TRAIN,
            RolloutConfig(num_engines=8, max_prompt_tokens=1024, max_response_tokens=4096),
        ),
        gpu="h100-80gb",
        work=Workload(mean_prompt=150, mean_response=795, longest_response=4096),
        seconds={"generation": 58, "logprobs": 18, "passes": 28, "refit": 5},
    ),
    Published(
        name="NeMo-RL, Llama 3.1 70B, 64 H100",
        shape=LLAMA_70B,
        config=_config(
            ParallelConfig(data=4, tensor=4, pipeline=4, sequence=True),
            _NEMO_TRAIN,
            RolloutConfig(
                num_engines=16,
                tensor_parallel=4,
                max_prompt_tokens=1024,
                max_response_tokens=4096,
            ),
        ),
        gpu="h100-80gb",
        work=Workload(mean_prompt=150, mean_response=398, longest_response=4096),
        seconds={"generation": 84, "logprobs": 18, "passes": 28, "refit": 14},
    ),
    Published(
        name="verl, Qwen3-30B-A3B, 128 H20",
        shape=QWEN3_30B_A3B,
        config=_config(
            ParallelConfig(data=32, tensor=4, expert=8, sequence=True),
            TrainConfig(
                prompts_per_step=512,
                group_size=16,
                minibatches_per_step=4,
                max_tokens_per_microbatch=10240,
            ),
            RolloutConfig(
                num_engines=32,
                tensor_parallel=4,
                max_prompt_tokens=2048,
                max_response_tokens=8192,
                engine_args={"enforce_eager": True},
            ),
        ),
        gpu="h20-96gb",
        work=Workload(mean_prompt=150, mean_response=1600, longest_response=8192),
        seconds={"generation": 348, "logprobs": 50, "passes": 86},
    ),
)
