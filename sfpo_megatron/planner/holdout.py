"""Published figures that the planner's constants were not fitted to. No torch.

They judge planner/hardware.py, and no constant of it may follow from them: docs/scaling.md has the
errors apart from those of the fitted rows (planner/published.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.config.tree import MegatronConfig, ParallelConfig, RolloutConfig, TrainConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner import models
from sfpo_megatron.planner.published import Published, run_config
from sfpo_megatron.planner.time import Workload, forward_flops

_GPU = "h100-80gb"


def _rows_of(tokens: int) -> Workload:
    """Sequences of one length that nobody generated."""
    return Workload(mean_prompt=0, mean_response=tokens, longest_response=tokens)


def _skyrl(
    model: str,
    shape: ModelShape,
    parallel: ParallelConfig,
    mean_response: int,
    figures: dict[str, float],
    why: str,
) -> Published:
    train = TrainConfig(
        prompts_per_step=512,
        group_size=5,
        minibatches_per_step=2,
        max_tokens_per_microbatch=4096,
    )
    work = Workload(mean_prompt=200, mean_response=mean_response, longest_response=4096)
    return Published(
        name=f"SkyRL, {model}",
        shape=shape,
        config=run_config(parallel, train),
        gpu=_GPU,
        work=work,
        figures=figures,
        source="SkyRL a956457, docs/content/docs/examples/megatron.mdx; five rollouts a prompt and "
        "two minibatches by examples/train/megatron/run_search_megatron.sh",
        assumed="prompts of 200 tokens; no padding; the forward is the policy's and the "
        "reference's",
        misses=dict.fromkeys(figures, why),
    )


_SHORT = (
    "the published seconds are {share} of the peak, probably for want of work in a microbatch: a "
    "few sequences of a search environment"
)
_SKYRL = (
    _skyrl(
        "Qwen2.5-3B, 8 H100",
        models.QWEN2_5_3B,
        ParallelConfig(data=8),
        658,
        {"passes": 48, "logprobs": 39},
        _SHORT.format(share="11% (training) and 9% (forward)"),
    ),
    _skyrl(
        "Qwen2.5-7B, 8 H100",
        models.QWEN2_5_7B,
        ParallelConfig(data=8),
        819,
        {"passes": 93, "logprobs": 46},
        _SHORT.format(share="15% (training) and 21% (forward)"),
    ),
    _skyrl(
        "Qwen3-30B-A3B, 32 H100",
        models.QWEN3_30B_A3B,
        ParallelConfig(data=16, tensor=2, expert=8, sequence=True),
        1158,
        {"passes": 189, "logprobs": 145},
        "the published seconds are 1% of the peak, where Megatron-LM's row of this model is 24%: "
        "microbatches of one sequence (two in the forward)",
    ),
)


def _prime_rl(
    model: str, shape: ModelShape, gpus: int, tokens: int, seconds: float, why: str = ""
) -> Published:
    """`seconds` of a microbatch, which is a sequence on each GPU; a step has two."""
    train = TrainConfig(
        prompts_per_step=gpus,
        group_size=2,
        minibatches_per_step=1,
        max_tokens_per_microbatch=tokens,
    )
    config = run_config(ParallelConfig(data=gpus), train)
    recompute = MegatronConfig(transformer={"recompute_granularity": "full"})
    return Published(
        name=f"prime-rl, {model}, {tokens // 1024}k tokens, {gpus} H100",
        shape=shape,
        config=replace(config, megatron=recompute),
        gpu=_GPU,
        work=_rows_of(tokens),
        figures={"passes": 2 * seconds},
        source="prime-rl 559b447, benchmarks/results/BENCHMARKS.md (seconds, as its MFU counts "
        "attention without the causal mask and heads of another size)",
        assumed="plain data parallelism for FSDP2",
        misses={"passes": why} if why else {},
    )


_PRIME_RL = (
    _prime_rl(
        "Qwen3-4B RL",
        models.QWEN3_4B,
        8,
        16384,
        5.04,
        "their SFT of the same shape takes 2.64 s a microbatch: the rest is their RL step's own",
    ),
    _prime_rl("Qwen3-4B RL", models.QWEN3_4B, 8, 65536, 18.10),
    _prime_rl("Qwen3-4B SFT", models.QWEN3_4B, 8, 16384, 2.64),
    _prime_rl(
        "Qwen3-0.6B RL",
        models.QWEN3_0_6B,
        1,
        16384,
        1.38,
        "their SFT of the same shape takes 0.64 s a microbatch: the rest is their RL step's own",
    ),
    _prime_rl("Qwen3-0.6B RL", models.QWEN3_0_6B, 1, 65536, 6.46),
    _prime_rl(
        "Qwen3-0.6B SFT",
        models.QWEN3_0_6B,
        1,
        8192,
        0.32,
        "layers of 1024 hidden units reach less of the peak than the 4096 and more that the "
        "constant was chosen by",
    ),
)


def _megatron(
    model: str,
    shape: ModelShape,
    parallel: ParallelConfig,
    sequences: int,
    tflops: float,
    why: str,
) -> Published:
    """`tflops` of a GPU, turned into seconds of a step of `sequences` rows of 4096 tokens."""
    train = TrainConfig(
        prompts_per_step=sequences // 2,
        group_size=2,
        minibatches_per_step=1,
        max_tokens_per_microbatch=4096,
    )
    gpus = (parallel.data or 1) * parallel.model_size
    flops = 3 * forward_flops(shape, 4096) * 4096 * sequences
    overlap = MegatronConfig(ddp={"overlap_grad_reduce": True, "overlap_param_gather": True})
    return Published(
        name=f"Megatron-LM, {model}, {gpus} H100",
        shape=shape,
        config=replace(run_config(parallel, train), megatron=overlap),
        gpu=_GPU,
        work=_rows_of(4096),
        figures={"passes": flops / (tflops * 1e12 * gpus)},
        source=f"NVIDIA/Megatron-LM pull request 5728 ({tflops:g} TFLOP/s a GPU), layout and sizes "
        "by examples/moe_recipes",
        assumed="nothing",
        misses={"passes": why},
    )


_MEGATRON = (
    _megatron(
        "Qwen3-30B-A3B",
        models.QWEN3_30B_A3B,
        ParallelConfig(data=32, expert=8),
        256,
        240.5,
        "pretraining with tokens forced to be even over the experts reaches 24% of the peak; the "
        "planner's share for H100, which no row gave, is 15%",
    ),
    _megatron(
        "Qwen3-235B-A22B",
        models.QWEN3_235B_A22B,
        ParallelConfig(data=16, tensor=2, pipeline=8, virtual_pipeline=4, expert=32, sequence=True),
        2048,
        302.0,
        "the same (31% of the peak against 15%); and their exchange with other nodes is hidden "
        "behind computing and sends a token once a node, while the planner's is the plain one of "
        "`alltoall`, waited for",
    ),
)


def _paper(model: str, shape: ModelShape, ratio: float, why: str = "") -> Published:
    train = TrainConfig(
        prompts_per_step=128,
        group_size=8,
        minibatches_per_step=4,
        max_tokens_per_microbatch=24000,
    )
    rollout = RolloutConfig(
        placement="colocated",
        num_engines=8,
        max_prompt_tokens=2048,
        max_response_tokens=6144,
        gpu_memory_utilization=0.7,
    )
    config = run_config(ParallelConfig(data=8), train, rollout)
    config = replace(config, objective=ObjectiveConfig())
    return Published(
        name=f"SFPO's paper, {model}, 8 GPUs",
        shape=shape,
        config=config,
        gpu=_GPU,
        work=Workload.guessed(config),
        figures={"ratio": ratio},
        source="images/efficiency.png of Urheen/SFPO (hours and rollouts of both arms)",
        assumed="H100; 128 prompts a step; responses of half the limit; SFPO on throughout, no "
        "evaluation in the hours",
        misses={"ratio": why} if why else {},
    )


_PAPER = (
    _paper("R1-Distill-Qwen-1.5B", models.DISTILL_1_5B, 1.22),
    _paper("Qwen3-4B-Base", models.QWEN3_4B, 1.33),
    _paper(
        "R1-Distill-Qwen-7B",
        models.QWEN2_5_7B,
        1.18,
        "1.18 of the 441 s that GRPO's step took leaves 26 s for a pass, about 70% of the peak at "
        "the assumed length: responses were shorter, or the gate was closed for part of the run",
    ),
)

HELD_OUT = (*_SKYRL, *_PRIME_RL, *_MEGATRON, *_PAPER)


def _nemo_rl(
    model: str,
    shape: ModelShape,
    parallel: ParallelConfig,
    bound: float,
    work: Workload,
    *,
    prompts: int = 64,
    group: int = 32,
    minibatches: int = 4,
    engines: int = 8,
    engine_tensor: int = 1,
    placement: Literal["dedicated", "colocated"] = "colocated",
    transformer: dict[str, int] | None = None,
) -> Published:
    """Tokens of the prompts are assumed, and of the responses where `work` has no source."""
    train = TrainConfig(
        prompts_per_step=prompts,
        group_size=group,
        minibatches_per_step=minibatches,
        max_tokens_per_microbatch=4096,
    )
    rollout = RolloutConfig(
        placement=placement,
        num_engines=engines,
        tensor_parallel=engine_tensor,
        max_prompt_tokens=1024,
        max_response_tokens=int(work.longest_response),
    )
    overlap = MegatronConfig(
        transformer=dict(transformer or {}),
        ddp={"overlap_grad_reduce": True, "overlap_param_gather": True},
    )
    return Published(
        name=f"NeMo-RL, {model}",
        shape=shape,
        config=replace(run_config(parallel, train, rollout), megatron=overlap),
        gpu=_GPU,
        work=work,
        figures={"total": bound},
        source="NeMo-RL 7ea279a, tests/test_suites/llm, layouts by examples/configs/recipes/llm",
        assumed=f"{work.mean_prompt:g} + {work.mean_response:g} tokens on average",
    )


_MATH = Workload(mean_prompt=100, mean_response=250, longest_response=412)
_THINKING = Workload(mean_prompt=200, mean_response=3100, longest_response=3896)
BOUNDS = (
    _nemo_rl(
        "Llama 3.2 1B, 8 H100",
        models.LLAMA_1B,
        ParallelConfig(data=8),
        10.5,
        _MATH,
        prompts=32,
        group=16,
        minibatches=1,
    ),
    _nemo_rl(
        "Qwen2.5-Math-1.5B, 4 + 4 H100",
        models.QWEN2_5_1_5B,
        ParallelConfig(data=4),
        25,
        _MATH,
        prompts=32,
        group=16,
        minibatches=1,
        engines=4,
        placement="dedicated",
    ),
    _nemo_rl(
        "Qwen2.5-7B, 32 H100",
        models.QWEN2_5_7B,
        ParallelConfig(data=16, tensor=2),
        50,
        Workload(mean_prompt=150, mean_response=400, longest_response=3946),
        engine_tensor=4,
    ),
    _nemo_rl(
        "Moonlight-16B-A3B, 32 H100",
        models.MOONLIGHT_16B,
        ParallelConfig(data=8, pipeline=4, expert=4),
        70,
        Workload(mean_prompt=150, mean_response=600, longest_response=8042),
        prompts=32,
        group=16,
        minibatches=1,
        engines=32,
        transformer={
            "num_layers_in_first_pipeline_stage": 7,
            "num_layers_in_last_pipeline_stage": 6,
        },
    ),
    _nemo_rl(
        "Qwen3-30B-A3B, 64 H100",
        models.QWEN3_30B_A3B,
        ParallelConfig(data=4, tensor=4, pipeline=4, expert=4, sequence=True),
        220,
        _THINKING,
        engines=16,
        engine_tensor=4,
    ),
    _nemo_rl(
        "Qwen3-32B, 32 H100",
        models.QWEN3_32B,
        ParallelConfig(data=2, tensor=4, pipeline=4, sequence=True),
        400,
        _THINKING,
        minibatches=1,
        engine_tensor=4,
    ),
)
"""What a step may take at most by a nightly test; a mean beneath it says no more."""

LEFT_OUT = {
    "SkyRL, Qwen3.5-9B; verl, Qwen3.5-35B-A3B": "gated delta nets, a family that is not here",
    "NeMo-RL, Nemotron-Nano-v2-12B": "Mamba, a family that is not here",
    "NeMo-RL, gpt-oss-20B": "attention sinks and experts with biases, a family that is not here",
    "NeMo-RL, Qwen3-8B; prime-rl's LoRA": "weights that get no gradient",
    "NeMo-RL, SFT": "no rollouts, and the mean length of a row is not given",
    "prime-rl, Qwen3-30B-A3B": "FSDP gathers all experts for every microbatch",
    "Megatron-LM, FP8": "a GPU's peak is that of bf16",
}
"""Rows of the same sources, and what of them the planner has no notion of."""
