"""Seconds of one train step, phase by phase, from a roofline. No torch.

Compute at a share of the peak, transfers at a share of the bandwidth, nothing overlapped but where
Megatron is told to. Constants: planner/hardware.py; how close it comes: docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.host.gpus import GPUS_PER_NODE
from sfpo_megatron.planner import hardware
from sfpo_megatron.planner.hardware import Gpu
from sfpo_megatron.planner.memory import (
    DTYPE_BYTES,
    engine_memory,
    microbatch_tokens,
    num_params,
    rank_memory,
    weight_bytes,
)
from sfpo_megatron.planner.nodes import densest
from sfpo_megatron.planner.params import buffers_of, unlike_stages


@dataclass(kw_only=True, frozen=True, slots=True)
class Workload:
    """What a rollout batch is like; the config only bounds it."""

    mean_prompt: float
    mean_response: float
    longest_response: float

    @classmethod
    def guessed(cls, config: RunConfig) -> Workload:
        """Responses of half the limit on average, of which some reach it; prompts of a tenth."""
        rollout = config.rollout
        return cls(
            mean_prompt=max(0.1 * rollout.max_prompt_tokens, min(rollout.max_prompt_tokens, 64)),
            mean_response=0.5 * rollout.max_response_tokens,
            longest_response=rollout.max_response_tokens,
        )


@dataclass(kw_only=True, frozen=True, slots=True)
class StepSeconds:
    """Seconds of one train step, by phase."""

    generation: float
    logprobs: float
    """Old log-probs, and the reference's where there is a KL penalty."""
    passes: float
    """K + 1 passes, optimizer steps included."""
    reposition: float
    """Snapshot, lerp and the gather after it."""
    refit: float
    handover: float = 0.0
    """Colocated: the trainer's state to the host and back."""
    overlapped: bool = False
    """rollout.async_steps 1: the next step's rollouts are generated meanwhile."""

    @property
    def total(self) -> float:
        trained = self.logprobs + self.passes + self.reposition
        both = max(self.generation, trained) if self.overlapped else self.generation + trained
        return both + self.refit + self.handover


def active_params(shape: ModelShape) -> float:
    """Elements that a token is multiplied with: no embedding, the chosen experts, the head."""
    total = num_params(shape) - _looked_up(shape)
    moe = shape.moe
    if moe is not None:
        idle = (moe.num_experts - moe.experts_per_token) * 3 * moe.ffn_size * shape.hidden_size
        total -= idle * (shape.num_layers - moe.num_dense_layers)
    return float(total)


def _looked_up(shape: ModelShape) -> int:
    """Elements of an embedding that is no head: a token takes one row of it."""
    return 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size


def forward_flops(shape: ModelShape, length: float) -> float:
    """Operations of one token of a sequence of `length`, causal attention included."""
    heads = shape.num_heads * (shape.head_dim + shape.value_dim)
    seen = shape.num_layers * length / 2
    if shape.window is not None and length > shape.window:
        # A windowed query sees all that is before it, from the window's length on only as much.
        windowed = shape.window - shape.window**2 / (2 * length)
        seen += sum(shape.windowed) * (windowed - length / 2)
    return 2 * active_params(shape) + 2 * heads * seen


def step_seconds(shape: ModelShape, config: RunConfig, gpu: Gpu, work: Workload) -> StepSeconds:
    """`parallel.data` must be a number."""
    kl = config.objective.kl.coef > 0
    count = config.train.minibatches_per_step
    old = 1 - 1 / count  # the first minibatch's own forward yields its old_logprobs
    if config.objective.old_logprobs == "generator":
        old = 0.0
    elif config.objective.kl.in_reward:
        old = 1.0
    forward = _sweep_seconds(shape, config, gpu, work, backward=False)
    both = _sweep_seconds(shape, config, gpu, work, backward=True)
    optimizer = count * _optimizer_seconds(shape, config, gpu)
    size = num_params(shape) * DTYPE_BYTES[config.model.dtype]
    return StepSeconds(
        generation=generation_seconds(shape, config, gpu, work),
        logprobs=forward * (old + kl),
        passes=(config.sfpo.real_fast_passes + 1) * (both + optimizer),
        reposition=_reposition_seconds(shape, config, gpu) if config.sfpo.num_fast_passes else 0.0,
        refit=hardware.REFIT_S + size / hardware.REFIT_BYTES_PER_S,
        handover=_handover_seconds(shape, config),
        overlapped=config.rollout.async_steps > 0,
    )


def num_gpus(config: RunConfig) -> int:
    """Number of trainer GPUs."""
    assert config.parallel.data is not None, "resolve parallel.data first"
    return config.parallel.data * config.parallel.model_size


def _tokens(config: RunConfig, work: Workload) -> float:
    rollouts = config.train.prompts_per_step * config.train.group_size
    return rollouts * (work.mean_prompt + work.mean_response)


def _sweep_seconds(
    shape: ModelShape, config: RunConfig, gpu: Gpu, work: Workload, *, backward: bool
) -> float:
    """One forward over the rollout batch, or forward and backward."""
    parallel, tokens = config.parallel, _tokens(config, work)
    length = work.mean_prompt + work.mean_response
    recompute = config.megatron.transformer.get("recompute_granularity") == "full"
    sweeps = (3 + recompute) if backward else 1
    mfu = gpu.moe_mfu if shape.moe else hardware.DENSE_MFU
    flops = sweeps * tokens * forward_flops(shape, length)
    # Whole rollouts are dealt to data-parallel ranks: more ranks than rollouts stand idle.
    assert parallel.data is not None, "resolve parallel.data first"
    busy = min(parallel.data, config.train.rollouts_per_minibatch) * parallel.model_size
    compute = flops / (busy * gpu.flops * mfu)
    # Tensor parallel: two all-reduces a layer, each way; a rank sees its data-parallel share.
    dtype, tensor = DTYPE_BYTES[config.model.dtype], parallel.tensor
    own = tokens / (busy / (tensor * parallel.pipeline))
    layers = shape.num_layers / parallel.pipeline
    crossings = (2 + recompute) if backward else 1
    volume = 2 * 2 * (tensor - 1) / tensor * shape.hidden_size * dtype
    waiting = crossings * own * layers * volume / _bandwidth(gpu, config, tensor)
    if shape.moe is not None and parallel.expert > 1:
        # Their ranks are neighbours, whatever `tensor` is: Megatron deals them out apart.
        experts = parallel.expert * parallel.expert_tensor
        share = (parallel.expert - 1) / parallel.expert / tensor
        volume = 2 * shape.moe.experts_per_token * shape.hidden_size * dtype * share
        waiting += crossings * own * layers * volume / _bandwidth(gpu, config, experts)
    minibatches = config.train.minibatches_per_step
    microbatches = max(own / microbatch_tokens(config, length), minibatches)  # one in each at least
    chunks = microbatches * (parallel.virtual_pipeline or 1)
    bubble = minibatches * (parallel.pipeline - 1) / chunks
    return (compute + waiting) * (1 + bubble)


def _bandwidth(gpu: Gpu, config: RunConfig, ranks: int) -> float:
    """Bytes a second of a collective over `ranks` consecutive GPUs of the trainer."""
    near = densest(num_gpus(config), GPUS_PER_NODE).keeps_together(ranks)
    return hardware.LINK_SHARE * (gpu.link_bytes_per_s if near else gpu.network_bytes_per_s)


def _held(shape: ModelShape, config: RunConfig) -> tuple[int, int]:
    """(elements of params, of main params) on the fullest kind of rank."""
    found = []
    for stage in unlike_stages(shape, config):
        buffers = [buffer for _, buffer in buffers_of(shape, config, stage)]
        found.append((sum(b.numel for b in buffers), sum(b.owned(0) for b in buffers)))
    return max(found)


def _optimizer_seconds(shape: ModelShape, config: RunConfig, gpu: Gpu) -> float:
    """Reduce-scatter of fp32 grads, Adam, all-gather of params: once a minibatch."""
    params, owned = _held(shape, config)
    dtype, ddp = DTYPE_BYTES[config.model.dtype], config.megatron.ddp
    adam = 32 * owned / (hardware.HBM_SHARE * gpu.hbm_bytes_per_s)
    if config.megatron.optimizer.get("optimizer_cpu_offload"):
        adam = 8 * owned / hardware.PCIE_BYTES_PER_S
    grads = 0.0 if ddp.get("overlap_grad_reduce") else 4.0
    gather = 0.0 if ddp.get("overlap_param_gather") else dtype
    bandwidth = _bandwidth(gpu, config, num_gpus(config))
    return adam + params * (grads + gather) / bandwidth


def _reposition_seconds(shape: ModelShape, config: RunConfig, gpu: Gpu) -> float:
    params, owned = _held(shape, config)
    hbm = hardware.HBM_SHARE * gpu.hbm_bytes_per_s
    copies = 8 * owned / hbm + 12 * owned / hbm  # read and write; two reads and a write
    if config.sfpo.trajectory == "predicted":
        copies += 8 * owned / hbm + 12 * owned / hbm  # theta_1; and read twice, beside theta_0
    if config.sfpo.snapshot == "host":
        copies += 4 * owned / hardware.PCIE_BYTES_PER_S  # back; the way out is beside a pass
    gather = params * DTYPE_BYTES[config.model.dtype] / _bandwidth(gpu, config, num_gpus(config))
    return copies + gather


def _handover_seconds(shape: ModelShape, config: RunConfig) -> float:
    if config.rollout.placement != "colocated":
        return 0.0
    memory = rank_memory(shape, config)
    moved = memory.params + memory.main_params + memory.optimizer
    return 2 * moved / hardware.PCIE_BYTES_PER_S


def generation_seconds(shape: ModelShape, config: RunConfig, gpu: Gpu, work: Workload) -> float:
    """The batch is done when its longest rollout is: a decoding step reads the weights once and the
    keys and values of every sequence that still runs."""
    engine = decoder(shape, config, gpu)
    sequences = sequences_per_engine(config)
    context = work.mean_prompt + work.mean_response / 2
    fit = engine.room_for(work)
    steps = max(work.longest_response, sequences * work.mean_response / min(fit, sequences))
    running = sequences * work.mean_response / steps  # on average
    tokens = sequences * work.mean_response
    read = tokens * context * engine.context_s
    decode, prefill = tokens * engine.token_s, sequences * work.mean_prompt * engine.prompt_s
    return steps * engine.weights_s(running) + read + decode + prefill


def sequences_per_engine(config: RunConfig) -> float:
    """Rollouts of a step that an engine generates, on average."""
    return config.train.prompts_per_step * config.train.group_size / config.rollout.num_engines


@dataclass(kw_only=True, frozen=True, slots=True)
class Decoder:
    """What an engine's decoding steps cost, in seconds."""

    dense_s: float
    """Reading all weights but the routed experts' and an embedding that is no head, of which a
    token takes one row; and what a step costs without any work."""
    experts_s: float
    """Reading all routed experts."""
    idle_share: float
    """Experts that one token leaves alone."""
    context_s: float
    """Reading the keys and values of one token."""
    token_s: float
    """Computing of one token."""
    prompt_s: float
    """The same of a prompt's."""
    kv_tokens: int
    """Tokens whose keys and values fit."""

    def weights_s(self, running: float) -> float:
        """Part of a step that does not grow with the sequences' length, `running` of them."""
        return self.dense_s + self.experts_s * (1 - self.idle_share**running)

    def room_for(self, work: Workload) -> float:
        """Sequences that can run at a time."""
        return max(self.kv_tokens / (work.mean_prompt + work.mean_response), 1.0)


def decoder(shape: ModelShape, config: RunConfig, gpu: Gpu) -> Decoder:
    """One engine of the run."""
    rollout, moe = config.rollout, shape.moe
    memory = engine_memory(shape, config, gpu.memory_bytes)
    experts, idle = 0.0, 0.0
    if moe is not None:
        experts = weight_bytes(config) / rollout.tensor_parallel
        experts *= moe.num_experts * 3 * moe.ffn_size * shape.hidden_size
        experts *= shape.num_layers - moe.num_dense_layers
        idle = 1 - moe.experts_per_token / moe.num_experts
    rows = _looked_up(shape) * DTYPE_BYTES[config.model.dtype] / rollout.tensor_parallel
    hbm = hardware.HBM_SHARE * gpu.hbm_bytes_per_s
    overhead = hardware.DECODE_STEP_S
    if rollout.engine_args.get("enforce_eager"):
        overhead += hardware.EAGER_LAYER_S * shape.num_layers
    computing = 2 * active_params(shape) / (rollout.tensor_parallel * gpu.flops)
    return Decoder(
        dense_s=overhead + (memory.weights - rows - experts) / hbm,
        experts_s=experts / hbm,
        idle_share=idle,
        context_s=memory.kv_bytes_per_token / hbm,
        token_s=computing / hardware.DENSE_MFU,
        prompt_s=computing / hardware.PREFILL_MFU,
        kv_tokens=memory.kv_tokens,
    )
