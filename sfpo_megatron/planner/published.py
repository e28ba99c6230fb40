"""Published step breakdowns that the planner's constants were fitted to. No torch.

What they were not fitted to: planner/holdout.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner.hardware import GPUS
from sfpo_megatron.planner.models import LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B
from sfpo_megatron.planner.time import StepSeconds, Workload, step_seconds


@dataclass(kw_only=True, frozen=True, slots=True)
class Published:
    """Published figures of one run."""

    name: str
    shape: ModelShape
    config: RunConfig
    gpu: str
    work: Workload
    figures: dict[str, float]
    """Seconds, by the names of StepSeconds; `ratio`: of SFPO's step to GRPO's."""
    source: str
    assumed: str
    """What the source does not say."""
    misses: dict[str, str] = field(default_factory=dict)
    """Why a prediction is off by more than a quarter, by figure."""

    def predicted(self, figure: str) -> float:
        """What the planner says of it."""
        found = self._step_seconds(self.config)
        if figure != "ratio":
            return float(getattr(found, figure))
        fast = replace(self.config.sfpo, num_fast_passes=3)
        return self._step_seconds(replace(self.config, sfpo=fast)).total / found.total

    def _step_seconds(self, config: RunConfig) -> StepSeconds:
        return step_seconds(self.shape, config, GPUS[self.gpu], self.work)


def run_config(
    parallel: ParallelConfig, train: TrainConfig, rollout: RolloutConfig | None = None
) -> RunConfig:
    """A GRPO run in bf16 with a reference policy."""
    return RunConfig(
        output_dir="-",
        model=ModelConfig(path="-", dtype="bfloat16"),
        parallel=parallel,
        train=train,
        sfpo=SFPOConfig(num_fast_passes=0),
        # In the reward: only then do we, as they do, compute the log-probs of every minibatch.
        objective=ObjectiveConfig(kl=KLConfig(coef=0.01, where="reward")),
        rollout=rollout or RolloutConfig(),
        data=DataConfig(train=(DataSource(source="jsonl", path="-"),)),
    )


_NEMO_TRAIN = TrainConfig(
    prompts_per_step=64, group_size=32, minibatches_per_step=4, max_tokens_per_microbatch=4096
)
PUBLISHED = (
    Published(
        name="NeMo-RL, Llama 3.1 8B, 8 H100",
        shape=LLAMA_8B,
        config=run_config(
            ParallelConfig(data=4, pipeline=2),
            _NEMO_TRAIN,
            RolloutConfig(num_engines=8, max_prompt_tokens=1024, max_response_tokens=4096),
        ),
        gpu="h100-80gb",
        work=Workload(mean_prompt=150, mean_response=795, longest_response=4096),
        figures={"generation": 58, "logprobs": 18, "passes": 28, "refit": 5},
        source="NVIDIA-NeMo/RL issue 959 (v0.3, grpo_math_8B_megatron.yaml: 64 prompts x 32, at "
        "most 4096 tokens, minibatches of 512)",
        assumed="prompts of 150 tokens",
    ),
    Published(
        name="NeMo-RL, Llama 3.1 70B, 64 H100",
        shape=LLAMA_70B,
        config=run_config(
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
        figures={"generation": 84, "logprobs": 18, "passes": 28, "refit": 14},
        source="the same issue (grpo_math_70B_megatron.yaml)",
        assumed="prompts of 150 tokens",
    ),
    Published(
        name="verl, Qwen3-30B-A3B, 128 H20",
        shape=QWEN3_30B_A3B,
        config=run_config(
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
        figures={"generation": 348, "logprobs": 50, "passes": 86},
        source="verl, docs/advance/fully_async.md: colocated, 512 prompts x 16, responses of at "
        "most 8192 tokens",
        assumed="1600 tokens on average, TP4 x EP8, no CUDA graphs",
    ),
)
