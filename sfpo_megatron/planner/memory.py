"""Bytes of one trainer rank, by what they are for. No torch.

Params, grads, main params, optimizer state and snapshot are exact (tests/dist/test_planner.py holds
them to real allocations). Activations count the tensors that autograd saves, layer by layer, times
the microbatches in flight: within 10% for the local layer spec (15% where ranks share experts, as
routers do not send each the same), and for TransformerEngine's over stand-ins that save what its
modules save; never compared with a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

from sfpo_megatron.config.rules.optimizer_modes import OPTIMIZERS
from sfpo_megatron.config.tree import ParallelConfig, RunConfig
from sfpo_megatron.families.mla import MLAShape
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner.hardware import AWAY_BYTES
from sfpo_megatron.planner.params import Chunk, Spec, buffers_of, chunks_of, params_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "fp8": 1}
_LOGIT_BUFFERS = 2
"""fp32 buffers of a chunk in the log-prob kernel, half a chunk each, and the gradient's."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RankMemory:
    """Bytes; on the device but for `host`."""

    params: int
    grads: int
    main_params: int
    optimizer: int
    snapshot: int
    activations: int
    logits: int
    asleep: int = 0
    """What a colocated engine keeps while the trainer has the device."""
    refit: int = 0
    """What a colocated engine adds: its weights beside the trainer's state, and a bucket; there are
    no activations then."""
    host: int = 0
    """Page-locked: the snapshot, what of the optimizer is offloaded, and while colocated engines
    generate everything that has to come back."""

    @property
    def total(self) -> int:
        """Bytes on the device at the fullest moment: in the passes or in a refit."""
        passes = self.activations + self.logits
        apart = ("activations", "logits", "refit", "host")
        held = sum(getattr(self, f.name) for f in fields(self) if f.name not in apart)
        return held + max(passes, self.refit)


def rank_memory(
    shape: ModelShape,
    config: RunConfig,
    *,
    stage: int = 0,
    data_rank: int = 0,
    spec: Spec = "te",
    tokens: int | None = None,
    padding: float = 1.0,
    microbatches: int | None = None,
) -> RankMemory:
    """Bytes of a rank of pipeline stage `stage`. `parallel.data` must be a number.

    `tokens`: of a microbatch, by default the most that one can have. `padding`: tokens of the
    padded batch in the local spec's attention, over `tokens`. `microbatches`: of a minibatch, where
    they may be too few to fill the pipeline.
    """
    dtype = DTYPE_BYTES[config.model.dtype]
    ddp, optimizer = config.megatron.ddp, config.megatron.optimizer
    grad_bytes = 4 if ddp.get("grad_reduce_in_fp32", True) else dtype
    total = owned = 0
    parallel = config.parallel
    expert_rank = data_rank * parallel.tensor // (parallel.expert * parallel.expert_tensor)
    for of_experts, buffer in buffers_of(shape, config, stage, spec):
        total += buffer.numel
        owned += buffer.owned(expert_rank if of_experts else data_rank)
    main, moments = _optimizer_bytes(config, owned)
    snapshot, host = _snapshot_bytes(config, owned, moments)
    if optimizer.get("optimizer_cpu_offload"):
        share = float(optimizer.get("optimizer_offload_fraction", 1.0))
        away = int(share * (main + moments))
        host += away
        main, moments = int((1 - share) * main), int((1 - share) * moments)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = tokens or math.ceil(microbatch_tokens(config, longest))
    asleep = refit = 0
    if config.rollout.placement == "colocated":
        host += total * dtype + main + moments  # as mcore/offload.py: not grads, not the snapshot
        weights = engine_bytes(shape, config) // config.rollout.tensor_parallel
        asleep, refit = AWAY_BYTES, weights + config.refit.bucket_bytes
    return RankMemory(
        params=total * dtype,
        grads=total * grad_bytes,
        main_params=main,
        optimizer=moments,
        snapshot=snapshot,
        activations=activation_bytes(
            shape,
            config,
            stage=stage,
            spec=spec,
            tokens=tokens,
            padding=padding,
            microbatches=microbatches,
        ),
        logits=logit_bytes(shape, config, stage=stage, tokens=tokens),
        asleep=asleep,
        refit=refit,
        host=host,
    )


def microbatch_tokens(config: RunConfig, length: float) -> float:
    """Tokens of a full microbatch on a context-parallel rank, of rollouts of `length` tokens."""
    if config.train.microbatch_size is None:
        return config.train.max_tokens_per_microbatch
    return config.train.microbatch_size * length / config.parallel.context


def _snapshot_bytes(config: RunConfig, owned: int, moments: int) -> tuple[int, int]:
    """(on the device, on the host) for `owned` elements whose moments take `moments` bytes."""
    held = 2 if config.sfpo.trajectory == "predicted" else 1  # theta_0; and theta_1
    snapshot = 4 * held * owned if config.sfpo.num_fast_passes else 0
    if config.sfpo.moments == "restore":
        snapshot += moments  # all fp32 then (config/check.py)
    return (0, snapshot) if config.sfpo.snapshot == "host" else (snapshot, 0)


def _optimizer_bytes(config: RunConfig, owned: int) -> tuple[int, int]:
    """(main params, moments) for `owned` elements."""
    settings = config.megatron.optimizer
    if settings.get("use_precision_aware_optimizer"):
        # TransformerEngine's FusedAdam keeps the 16 bits that bf16 params lack.
        main = 2 if config.model.dtype == "bfloat16" else 4
    else:
        main = 0 if config.model.dtype == "float32" else 4  # fp32: views of the params
    kind = str(settings.get("optimizer", "adam"))
    if kind != "adam":
        return main * owned, 4 * OPTIMIZERS[kind] * owned
    moments = sum(
        DTYPE_BYTES.get(str(settings.get(name, "float32")), 4)
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
    )
    return main * owned, moments * owned


# --- activations ------------------------------------------------------------------------------


def microbatches_in_flight(config: RunConfig, stage: int) -> tuple[int, int]:
    """(chunk activations held at a time, chunks of a stage): 1F1B, or interleaved."""
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual is None:
        return pipeline - stage, 1
    return 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, virtual


def activation_bytes(
    shape: ModelShape,
    config: RunConfig,
    *,
    stage: int,
    spec: Spec,
    tokens: int,
    padding: float = 1.0,
    microbatches: int | None = None,
) -> int:
    """What autograd keeps between forward and backward, logits not counted."""
    chunks = chunks_of(shape, config, stage)
    in_flight, of_chunks = microbatches_in_flight(config, stage)
    if microbatches is not None:
        in_flight = min(in_flight, microbatches * of_chunks)
    layers = [layer for chunk in chunks for layer in chunk.layers]
    settings, dtype = config.megatron.transformer, DTYPE_BYTES[config.model.dtype]
    sequence = config.parallel.tensor if config.parallel.sequence else 1
    whole = sum(layer_bytes(shape, config, layer, spec, padding) for layer in layers)
    per_token, once = whole, 0.0
    if settings.get("recompute_granularity") == "full":
        # Each unit's input stays; one unit at a time is computed again.
        kept, num = dtype * shape.hidden_size / sequence, len(layers)
        unit = int(settings.get("recompute_num_layers") or 1)
        if settings.get("recompute_method") == "block":
            num_full = min(unit * of_chunks, num)
            per_token = kept * num_full + whole * (num - num_full) / max(num, 1)
        else:
            per_token, once = kept * -(-num // unit), whole / max(num, 1) * unit
    final = _norm_bytes(shape.hidden_size, dtype, spec) / sequence if chunks[-1].last else 0.0
    return int(tokens * (in_flight / of_chunks * per_token + once + final))


def _norm_bytes(size: float, dtype: int, spec: Spec) -> float:
    """Saved by a norm and the linear layer that reads it, per token."""
    if spec == "te":
        return 2 * dtype * size + 4  # input, output; 1 / rms
    return 8 * size + 4 + dtype * size  # input and normalized input in fp32; output


def layer_bytes(
    shape: ModelShape, config: RunConfig, layer: int, spec: Spec, padding: float = 1.0
) -> float:
    """Saved by one layer, per token on a tensor-parallel rank."""
    parallel, dtype = config.parallel, DTYPE_BYTES[config.model.dtype]
    sequence = parallel.tensor if parallel.sequence else 1
    again = _recomputed_modules(config)
    norms = 2 * _norm_bytes(shape.hidden_size, dtype, spec) / sequence
    if shape.mla is not None:
        attention = (
            _latent_bytes(shape.mla, dtype, spec) / sequence + 4 * dtype * shape.mla.rope_dim
        )
        attention += _latent_heads_bytes(shape, dtype, spec, padding) / parallel.tensor
    else:
        attention = _attention_bytes(shape, parallel.tensor, dtype, spec, padding)
    moe = shape.moe
    if "layernorm" in again:
        norms -= 2 * dtype * shape.hidden_size / sequence
    if moe is None or layer < moe.num_dense_layers:
        if "mlp" in again:
            return norms + attention
        mlp = _mlp_factor(spec) * dtype * shape.ffn_size / parallel.tensor
        return norms + attention + mlp
    if "moe" in again:
        return norms + attention
    chosen, experts = moe.experts_per_token, moe.num_experts
    # Under sequence parallelism a rank routes its own tokens; they come back from all ranks.
    ranks = parallel.tensor if parallel.sequence else 1
    routing = (20 * chosen + experts * (1 + dtype)) / ranks
    permuted = chosen * dtype * (shape.hidden_size + 1) / ranks
    factor = _mlp_factor(spec) + (spec == "local") - ("moe_act" in again)
    hidden = chosen * dtype * moe.ffn_size / ranks * factor
    if spec == "te":
        permuted += chosen * dtype * shape.hidden_size / ranks  # output, before it is weighted
    shared = _mlp_factor(spec) * dtype * moe.shared_ffn_size / parallel.tensor
    return norms + attention + routing + permuted + hidden + shared


def _recomputed_modules(config: RunConfig) -> tuple[str, ...]:
    """Modules under selective recompute. Megatron's default, core_attn, saves nothing beside flash
    attention, which recomputes by itself."""
    settings = config.megatron.transformer
    if settings.get("recompute_granularity") != "selective":
        return ()
    return tuple(settings.get("recompute_modules") or ("core_attn",))


def _mlp_factor(spec: Spec) -> int:
    """Times the MLP's size: gate and up, their product; torch also keeps silu and both halves."""
    return 3 if spec == "te" else 5


def _attention_bytes(
    shape: ModelShape, tensor: int, dtype: int, spec: Spec, padding: float
) -> float:
    heads, groups, size = shape.num_heads, shape.num_kv_heads, shape.head_dim
    if spec == "te":  # q, k, v after the rotation, the output, its log-sum-exp
        flash = dtype * (2 * heads + 2 * groups) * size + 4 * heads
        if shape.qk_norm:
            flash += dtype * (heads + groups) * size
        return flash / tensor
    # q, k, v with keys and values repeated for all heads, once as they are and once padded.
    saved = dtype * heads * size * (4 + 4 * padding) + 4 * heads * padding
    if shape.qk_norm:
        saved += (8 * size + 4) * (heads + groups)
    return saved / tensor + 4 * dtype * size + 8


def _latent_bytes(mla: MLAShape, dtype: int, spec: Spec) -> float:
    """The short vectors: their norms, and what of a key is rotated."""
    query = _norm_bytes(mla.query_rank, dtype, spec) if mla.query_rank else 0.0
    return query + _norm_bytes(mla.kv_rank, dtype, spec) + dtype * mla.rope_dim


def _latent_heads_bytes(shape: ModelShape, dtype: int, spec: Spec, padding: float) -> float:
    """Saved by the attention of latent heads; torch's values are as wide as its keys, TE's are
    not."""
    keys, values = shape.head_dim, shape.value_dim
    if spec == "te":
        return shape.num_heads * (dtype * 2 * (keys + values) + 4)
    own = 3 * keys + values + 4 * keys * padding
    return shape.num_heads * (dtype * own + 4 * padding) + 8


def logit_bytes(shape: ModelShape, config: RunConfig, *, stage: int, tokens: int) -> int:
    """Logits in the model's dtype (their gradient is written over them), and the kernel's chunk."""
    if stage != config.parallel.pipeline - 1:
        return 0
    columns = shape.padded_vocab_size(config.parallel.tensor) // config.parallel.tensor
    chunk = min(tokens, config.train.logprob_chunk_tokens)
    return columns * (tokens * DTYPE_BYTES[config.model.dtype] + 4 * _LOGIT_BUFFERS * chunk)


# --- engines ----------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True, slots=True)
class EngineMemory:
    """Bytes of one GPU of an engine."""

    weights: int
    kv_cache: int
    kv_bytes_per_token: int

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.kv_cache // self.kv_bytes_per_token


@functools.cache
def num_params(shape: ModelShape) -> int:
    """Params of the whole model, tied embeddings once."""
    whole = Chunk(layers=tuple(range(shape.num_layers)), first=True, last=True)
    return sum(param.numel for param in params_of(shape, ParallelConfig(), whole))


def engine_bytes(shape: ModelShape, config: RunConfig) -> int:
    """Bytes of an engine's weights on all of its GPUs. vLLM quantizes linears: the embedding and
    the head stay in the model's dtype."""
    ends = shape.padded_vocab_size(1) * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    inner = num_params(shape) - ends
    return inner * weight_bytes(config) + ends * DTYPE_BYTES[config.model.dtype]


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a weight of one of an engine's linears."""
    given = config.rollout.quantization or config.rollout.engine_args.get("quantization")
    return 1 if given else DTYPE_BYTES[config.model.dtype]


def engine_memory(shape: ModelShape, config: RunConfig, gpu_bytes: int) -> EngineMemory:
    """vLLM takes `gpu_memory_utilization` of the GPU: weights, then keys and values."""
    tensor, dtype = config.rollout.tensor_parallel, DTYPE_BYTES[config.model.dtype]
    weights = engine_bytes(shape, config) // tensor
    if shape.mla is not None:
        per_token = (shape.mla.kv_rank + shape.mla.rope_dim) * dtype * shape.num_layers
    else:
        groups = max(shape.num_kv_heads // tensor, 1)
        per_token = 2 * groups * shape.head_dim * dtype * shape.num_layers
    room = int(config.rollout.gpu_memory_utilization * gpu_bytes) - weights
    return EngineMemory(weights=weights, kv_cache=max(room, 0), kv_bytes_per_token=per_token)
